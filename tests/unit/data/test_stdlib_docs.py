"""Areas of the standard library: what is read, what is not, and how clients share it."""

from pathlib import Path

import pytest

from flower_split.config import DataConfig, RunConfig
from flower_split.data import load_client_data, load_tokenizer
from flower_split.data.source import SourceRequest
from flower_split.data.sources.documentation import DocumentationSource
from flower_split.data.stdlib_docs import AREAS, Area, area_docstrings, library_files
from flower_split.data.tally import Tally
from flower_split.errors import DataError

LONG = "{} is documented here in a sentence of more than a dozen words, {} says why."


def _doc(name: str) -> str:
    return LONG.format(name, name)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A library with one module for each area, of 4, 3, 2 and 1 documented functions and more."""
    for count, (name, module) in zip(
        (4, 3, 2, 1), (("n", "http"), ("d", "json"), ("t", "ast"), ("s", "os")), strict=True
    ):
        functions = "".join(f'def f{i}():\n    """{_doc(name + str(i))}"""\n' for i in range(count))
        (tmp_path / f"{module}.py").write_text(f'"""{_doc(name)}"""\nraise SystemExit\n{functions}')
    (tmp_path / "email").mkdir()
    (tmp_path / "email" / "bad.py").write_text(f'"""{_doc("bad")}"""\nprint "no"\n')
    (tmp_path / "email" / "short.py").write_text('"""Too short to say anything."""\n')
    (tmp_path / "email" / "again.py").write_text(f'"""{_doc("n")}"""\n')
    (tmp_path / "email" / "method.py").write_text(
        f'class C:\n    async def m(self):\n        """First line of {_doc("m")}\n\n'
        '        Indented.\n        """\n'
    )
    for folder in ("test", "site-packages"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "http.py").write_text(f'"""{_doc("not library")}"""\n')
    (tmp_path / "unlisted.py").write_text(f'"""{_doc("unlisted")}"""\n')
    return tmp_path


def test_area_of_four_has_its_docstrings_in_order_once_and_runs_nothing(library: Path) -> None:
    assert area_docstrings(0, 4, library) == Area(
        "networking",
        (
            _doc("n"),  # email/again.py; http.py has it again
            f"First line of {_doc('m')}\n\nIndented.",
            *(_doc(f"n{i}") for i in range(4)),
        ),
    )
    assert area_docstrings(3, 4, library) == Area("system", (_doc("s"), _doc("s0")))


@pytest.mark.parametrize("clients", range(1, 7))
def test_areas_for_any_number_of_clients_share_everything_once(library: Path, clients: int) -> None:
    areas = [area_docstrings(number, clients, library) for number in range(clients)]
    together = [text for area in areas for text in area.docstrings]
    whole = [text for i in range(4) for text in area_docstrings(i, 4, library).docstrings]
    assert together == whole and len(whole) == 15
    assert all(len(area.docstrings) >= 2 for area in areas)
    assert len({area.name for area in areas}) == clients


def test_areas_for_three_and_five_join_the_smallest_and_halve_the_largest(library: Path) -> None:
    names = [area_docstrings(number, 3, library).name for number in range(3)]
    assert names == ["networking", "data types", "tools, system"]
    names = [area_docstrings(number, 5, library).name for number in range(5)]
    assert names == ["networking 1", "networking 2", "data types", "tools", "system"]


def test_areas_for_too_many_clients_are_refused(library: Path) -> None:
    with pytest.raises(DataError, match="not enough for 20 clients"):
        area_docstrings(0, 20, library)


def request(**settings: object) -> SourceRequest:
    return SourceRequest(
        config=DataConfig(**settings),  # type: ignore[arg-type]
        partition_id=1,
        num_partitions=4,
        tally=Tally(),
    )


def test_source_gives_a_clients_area_or_all_areas_for_a_partitioner(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    own = DocumentationSource().read(request())
    assert (own.own, own.name) == (True, "data types")
    shared = DocumentationSource().read(request(partitioner="dirichlet", partition_by="area"))
    assert not shared.own and len(shared.records) == 15
    names = {record.content["area"] for record in shared.records}
    assert names == {"networking", "data types", "tools", "system"}
    mine = [r.content["text"] for r in shared.records if r.content["area"] == "data types"]
    assert mine == [record.content["text"] for record in own.records]


def test_library_without_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="source must be installed; .* holds no .py file"):
        library_files(tmp_path)


def test_areas_name_every_module_once() -> None:
    modules = [module for _, lists in AREAS for line in lists for module in line.split()]
    assert len(modules) == len(set(modules))


def test_client_of_the_installed_library_has_enough_to_learn_from() -> None:
    config = RunConfig()
    data = load_client_data(config, load_tokenizer(config.model), 1, 4)
    assert data.name == "data types"
    assert len(data.train) > 300 and len(data.evaluate) > 60
    assert data.counts.near_duplicates > 0
    assert all(len(example.input_ids) == 128 for example in data.train[:-1])
    starts = {tuple(example.input_ids) for example in data.train}
    assert starts.isdisjoint(tuple(example.input_ids) for example in data.evaluate)
