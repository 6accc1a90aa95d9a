"""Pictures as records: from files, from bytes, from data sets; what is refused; what a batch is."""

import io
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoImageProcessor

from flower_split.config import DataConfig, ModelConfig, RunConfig, Scalar
from flower_split.data import ClientData, load_client_data
from flower_split.data.batches import collate
from flower_split.errors import ConfigError, DataError
from tests.support.task_runs import make_base, records, write_records

ROWS = records("image-classification", 3, 6)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("vit") / "base", "vit")


def load(base: Path, path: Path, **data: Scalar) -> ClientData:
    config = RunConfig(
        model=ModelConfig(name=str(base), task="image-classification", labels="dark, bright"),
        data=DataConfig(path=str(path), eval_fraction=0.4, **data),
    )
    return load_client_data(config, None, 0, 1)


def expected(base: Path, rows: Sequence[dict[str, object]]) -> list[tuple[int, torch.Tensor]]:
    """Class and pixels of each, by the model's own processor."""
    processor = AutoImageProcessor.from_pretrained(base)
    pixels = [processor(row["image"], return_tensors="pt")["pixel_values"][0] for row in rows]
    return sorted(
        ((["dark", "bright"].index(str(r["label"])), p) for r, p in zip(rows, pixels, strict=True)),
        key=lambda pair: pair[1].tolist(),
    )


def encoded(row: dict[str, object]) -> bytes:
    image, file = row["image"], io.BytesIO()
    assert isinstance(image, Image.Image)
    image.save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved", "saved as images"])
def test_pictures_are_those_of_the_models_own_processor(
    tmp_path: Path, base: Path, form: str
) -> None:
    path = tmp_path / form
    if form == "jsonl":
        write_records(path, ROWS)
    else:
        rows = [{"image": encoded(row), "label": row["label"]} for row in ROWS]
        features = Features({"image": Value("binary"), "label": Value("string")})
        if form == "saved as images":
            features["image"] = ImageFeature()
            rows = [{**row, "image": {"bytes": row["image"], "path": None}} for row in rows]
        table = Dataset.from_list(rows, features=features)
        table.to_parquet(path) if form == "parquet" else table.save_to_disk(str(path))
    data = load(base, path, source=form.split()[0])
    assert (len(data.train), len(data.evaluate)) == (4, 2)  # 0.4 of six are held out, rounded
    batch = collate([*data.train, *data.evaluate], 0)
    assert batch.keys() == {"pixel_values", "labels"}
    assert batch["pixel_values"].shape == (6, 3, 16, 16)
    found = sorted(
        zip(batch["labels"].tolist(), batch["pixel_values"], strict=True),
        key=lambda pair: pair[1].tolist(),
    )
    for (label, pixels), (true, own) in zip(found, expected(base, ROWS), strict=True):
        assert label == true and torch.equal(pixels, own)


def test_equal_pictures_are_on_one_side(tmp_path: Path, base: Path) -> None:
    twice = [ROWS[0]] * 5 + list(ROWS[1:3])
    data = load(base, write_records(tmp_path / "rows.jsonl", twice), source="jsonl")
    sides = [
        {
            example.image.inputs()["pixel_values"].sum().item()
            for example in side
            if example.image is not None
        }
        for side in (data.train, data.evaluate)
    ]
    assert all(sides) and not sides[0] & sides[1]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"image": "gone.png", "label": "dark"}, "gone.png cannot be read"),
        ({"image": "rows.jsonl", "label": "dark"}, "cannot be decoded"),
        ({"image": 7, "label": "dark"}, "must be a path, or the bytes"),
        ({"image": "gone.png"}, "label is missing"),
    ],
)
def test_a_record_without_a_picture_is_refused_or_counted(
    tmp_path: Path, base: Path, row: dict[str, object], words: str
) -> None:
    path = write_records(tmp_path / "rows.jsonl", [*ROWS, row])
    with pytest.raises(DataError, match=words):
        load(base, path, source="jsonl")
    data = load(base, path, source="jsonl", on_bad_record="skip")
    assert len(data.train) + len(data.evaluate) == 6 and data.counts.bad_records == 1


def test_a_model_without_an_image_processor_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "vit", "vit")
    (base / "preprocessor_config.json").unlink()
    path = write_records(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ConfigError, match="must have an image processor"):
        load(base, path, source="jsonl")
