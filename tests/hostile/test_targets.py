"""Every fuzz target stands its corpus and inputs near it; the long searches are atheris's."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.hostile.targets.playing import TARGETS, corpus_of, play
from tests.hostile.targets.target import CORPUS, Target, joined, parts_of, variants

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parent.parent.parent
LIVE = ("member", "stranger")  # over gRPC: a call takes a millisecond or several


@pytest.mark.parametrize("name", list(TARGETS))
def test_target_stands_its_corpus_and_what_is_near_it(name: str) -> None:
    target, corpus = TARGETS[name], corpus_of(TARGETS[name])
    count = 100 if name in LIVE else 300
    near = variants(list(corpus.values()), count, seed=5)
    numbered = ((f"variant {index}", data) for index, data in enumerate(near))
    outcomes = play(target, [*corpus.items(), *numbered])
    assert outcomes.total() == len(corpus) + count
    # What is read in the end, and what is refused before: neither is the whole of it.
    assert outcomes.pop("accepted") > 0
    assert outcomes.total() > 0


def test_corpus_is_small_enough_for_every_run() -> None:
    assert sum(path.stat().st_size for path in CORPUS.glob("*/*")) < 300 << 10


def test_input_that_a_target_does_not_stand_is_named_with_its_bytes() -> None:
    @contextmanager
    def opened() -> Iterator[Callable[[bytes], None]]:
        def run(data: bytes) -> None:
            if data == b"\x07":
                raise KeyError("seven")
            raise ValueError("of another kind")

        yield run

    target = Target("seven", (ValueError,), opened)
    assert play(target, [("six", b"\x06")]) == {"ValueError": 1}
    with pytest.raises(AssertionError, match="seven did not stand the bad one: 07"):
        play(target, [("the bad one", b"\x07")])


def test_parts_of_an_input_are_those_it_was_made_of_and_any_bytes_have_some() -> None:
    assert parts_of(joined([b"abc", b"", b"\0" * 300])) == [b"abc", b"", b"\0" * 300]
    assert parts_of(b"\xff\xffabc") == [b"abc"]
    assert parts_of(b"\x01") == []


def test_variants_are_the_same_for_a_seed_and_differ_from_the_corpus() -> None:
    corpus = [bytes(range(200)), b"abc" * 50]
    made = list(variants(corpus, 50, seed=1))
    assert made == list(variants(corpus, 50, seed=1)) and len(set(made)) > 40
    assert sum(data in corpus for data in made) < 5


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", list(TARGETS))
def test_atheris_finds_nothing_in_a_minute(name: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="install the extra fuzz")
    command = [sys.executable, "-m", "tests.hostile.targets", name, "--seconds", "60"]
    done = subprocess.run(
        [*command, "--found", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(tmp_path.iterdir()) == []
