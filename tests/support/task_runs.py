"""Tiny models, tokenizers and records for every ``model.task``."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

WORDS = [
    "sun",
    "moon",
    "star",
    "sea",
    "land",
    "rock",
    "tree",
    "leaf",
    "bird",
    "fish",
    "red",
    "blue",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "</s>"]
VOCABULARY = [*SPECIAL, *WORDS]
IMAGE = "<image>"
SIZE = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "eos_token_id": 5}


@dataclass(frozen=True)
class TaskRun:
    """One task on one family."""

    task: str
    family: str
    labels: tuple[str, ...] = ()


RUNS = (
    TaskRun("sequence-classification", "bert", ("sky", "earth")),
    TaskRun("sequence-classification", "llama", ("sky", "earth")),
    TaskRun("token-classification", "bert", ("O", "sky", "earth")),
    TaskRun("masked-lm", "bert"),
    TaskRun("seq2seq", "t5"),
    TaskRun("question-answering", "bert"),
    TaskRun("causal-lm", "llama"),
    TaskRun("image-classification", "vit", ("dark", "bright")),
    TaskRun("image-text-to-text", "llava"),
)


def make_base(path: Path, family: str) -> Path:
    """A base model without any head for a task, seeded, with a tokenizer of words or an image processor."""
    if family == "vit":
        return _make_vit(path)
    if family == "llava":
        return _make_llava(path)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if family == "bert":
        words.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        special |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    else:
        special["eos_token"] = "</s>"
    inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if family == "bert" else [])
    PreTrainedTokenizerFast(
        tokenizer_object=words, model_input_names=inputs, **special
    ).save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    if family == "bert":
        config = BertConfig(
            **SIZE, **sizes, intermediate_size=48, max_position_embeddings=32,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        BertForMaskedLM(config).save_pretrained(path)
    elif family == "llama":
        config = LlamaConfig(
            **SIZE, **sizes, intermediate_size=48, num_key_value_heads=2, max_position_embeddings=32
        )
        LlamaForCausalLM(config).save_pretrained(path)
    else:
        config = T5Config(
            **SIZE, d_model=32, d_kv=8, d_ff=48, num_layers=4, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0,
        )  # fmt: skip
        T5ForConditionalGeneration(config).save_pretrained(path)
    return path


def _make_vit(path: Path) -> Path:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, image_size=16,
        patch_size=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(path)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(path)
    return path


def _make_llava(path: Path) -> Path:
    """A picture is four positions of the language model, by four patches of 8 × 8."""
    known = {w: i for i, w in enumerate([*VOCABULARY, IMAGE])}
    words = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>",
        extra_special_tokens={"image_token": IMAGE},
    )  # fmt: skip
    pixels = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    LlavaProcessor(
        image_processor=pixels, tokenizer=tokenizer, patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    ).save_pretrained(path)  # fmt: skip
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **sizes, num_hidden_layers=2, image_size=16, patch_size=8, projection_dim=16
        ),
        text_config=LlamaConfig(
            **sizes, vocab_size=len(known), num_hidden_layers=4, num_key_value_heads=2,
            max_position_embeddings=32, pad_token_id=0, eos_token_id=5, initializer_range=0.3,
        ),
        image_token_id=known[IMAGE], image_seq_length=4, pad_token_id=0, eos_token_id=5,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(path)
    return path


def picture(chance: torch.Generator, bright: bool) -> Image.Image:
    """A dark or a bright picture of noise, which is no square."""
    noise = torch.randint(96, (12, 20, 3), generator=chance, dtype=torch.uint8)
    return Image.fromarray((noise + 128 * bright).to(torch.uint8).numpy())


def records(task: str, seed: int, count: int) -> list[dict[str, object]]:
    """Records that can be learned: sky words and earth words, copies, a coloured word."""
    chance = torch.Generator().manual_seed(seed)

    def pick(words: Sequence[str], number: int) -> list[str]:
        return [words[int(i)] for i in torch.randint(len(words), (number,), generator=chance)]

    found: list[dict[str, object]] = []
    for index in range(count):
        kind = index % 2
        text = pick(WORDS[:3] if kind == 0 else WORDS[3:6], 3 + index % 3)
        if task == "image-classification":
            found.append({"image": picture(chance, kind == 1), "label": ["dark", "bright"][kind]})
        elif task == "image-text-to-text":
            said = [["star", "sea"], ["rock", "tree", "leaf"]][kind]
            prompt = " ".join(pick(WORDS[8:10], 1 + index % 3))
            image = picture(chance, kind == 1)
            found.append({"image": image, "prompt": prompt, "completion": " ".join(said)})
        elif task == "sequence-classification":
            label: object = ["sky", "earth"][kind] if index % 3 else kind  # by name, or index
            found.append({"text": " ".join(text), "label": label})
        elif task == "token-classification":
            words = [*text, *pick(WORDS[6:], 2)]
            classes = ["O" if w in WORDS[6:] else ["sky", "earth"][w in WORDS[3:6]] for w in words]
            found.append({"tokens": words, "label": classes})
        elif task == "question-answering":
            around = pick(WORDS[6:10], 4)
            answer = text[:2]
            context = " ".join([*around[:2], *answer, *around[2:]])
            start = context.index(" ".join(answer))
            answers = {"text": [" ".join(answer)], "answer_start": [start]}
            found.append(
                {"question": ["red", "blue"][kind], "context": context, "answers": answers}
            )
        elif task == "masked-lm":
            found.append({"text": " ".join(text * 3)})
        else:
            found.append({"prompt": " ".join(text), "completion": " ".join(reversed(text))})
    return found


def write_records(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """JSON lines; pictures in files beside, by names that begin at its folder."""
    lines = []
    for number, row in enumerate(rows):
        image = row.get("image")
        if isinstance(image, Image.Image):
            name = f"{path.stem}-{number}.png"
            image.save(path.parent / name)
            row = {**row, "image": name}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path
