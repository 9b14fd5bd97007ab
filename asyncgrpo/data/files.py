"""Rows from a path or hub name, each with the place that an error about it names; and to a file.

| path                              | read as                                                     |
|-----------------------------------|-------------------------------------------------------------|
| x.parquet                         | Parquet (pyarrow)                                           |
| any other file                    | JSONL, UTF-8; blank lines are passed over                   |
| data/*.jsonl                      | the files it matches, by name                               |
| a folder of save_to_disk          | an Arrow data set (datasets)                                |
| any other folder                  | its .jsonl and .parquet files, at any depth, by name        |
| owner/name[/config][:split]       | a data set of the hub (datasets); split train unless given  |
"""

from __future__ import annotations

import csv
import glob
import importlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import msgpack

from asyncgrpo.errors import AbsentData, DataError
from asyncgrpo.imports import shown

Row = dict[str, Any]
Located = tuple[str, Row | DataError]  # the place of a row; what is wrong with it, if anything
FILE_PATTERNS = ("*.jsonl", "*.parquet")
FILE_ENDINGS = (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".txt", ".tsv")
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # what save_to_disk writes in a folder
HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/([\w.-]+))?(?::(\w+))?")
PLAIN = str | int | float | bytes | None
SUSPECT = re.compile(r"\d{19}|\\u[dD][89a-fA-F]")  # JSON with perhaps a huge integer or half a pair


def read_rows(path: str | Path) -> list[Located]:
    """All rows in file order. A row that is not a JSON object is returned as its error.

    Raises DataError for what cannot be read at all: missing, empty, not UTF-8, offline, or the
    optional packages of asyncgrpo[data] are needed and not installed.
    """
    text = str(path)
    place = Path(text).expanduser()
    if place.is_dir():
        rows = _folder(place)
    elif place.is_file():
        rows = list(_file(place))
    elif glob.has_magic(text):
        found = map(Path, sorted(glob.glob(str(place), recursive=True)))
        files = [file for file in found if file.is_file()]
        if not files:
            raise AbsentData(f"no file matches {str(place)!r}; {_neighbours(place)}")
        rows = [row for file in files for row in _file(file)]
    elif (hub := HUB_NAME.fullmatch(text)) and place.suffix not in FILE_ENDINGS:
        rows = _from_hub(text, *hub.groups())
    else:
        raise AbsentData(f"data file {text} does not exist; {_neighbours(place)}")
    if not rows:
        raise DataError(f"{text} holds no records; it needs one JSON object per line")
    return rows


def dataset_rows(dataset: Any, name: str) -> list[Located]:
    """Rows of a datasets.Dataset as they are stored: nothing is decoded into images or tensors."""
    return list(_table(dataset.with_format("arrow")[:], name))


def as_jsonl(dataset: Any, name: str) -> str:
    """The rows of a datasets.Dataset, or of any iterable of dicts, as lines of JSONL.

    Raises DataError, naming the row, for what is no dict and for values that JSON does not have.
    """
    library = sys.modules.get("datasets")  # whoever has a Dataset has imported it
    rows: Iterable[Any] = dataset if isinstance(dataset, Iterable) else [dataset]
    if isinstance(dataset, getattr(library, "Dataset", ())):
        rows = [row for _, row in dataset_rows(dataset, name)]
    return "".join(_checked_line(row, f"{name} row {index}") for index, row in enumerate(rows))


def _checked_line(row: Any, where: str) -> str:
    if not isinstance(row, Mapping) or not all(isinstance(column, str) for column in row):
        raise DataError(
            f"{where} is {shown(row)} ({type(row).__name__}), not a dict with text as keys; "
            "give rows, such as one split of a DatasetDict, or df.to_dict('records') of a DataFrame"
        )
    for column, value in row.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: column {column!r} holds {shown(value)} ({type(value).__name__}), "
                f"which JSON cannot hold: {error}; make it text, a number, a list or a dict"
            ) from None
    return as_line(dict(row))


def source_name(path: str | Path) -> str:
    """A short name for a data set: of its file, its folder, or the data set on the hub."""
    text = str(path)
    hub = HUB_NAME.fullmatch(text)
    if hub and not Path(text).exists():
        text = hub[1]
    plain = list(takewhile(lambda part: not glob.has_magic(part), Path(text).parts))
    return Path(*plain).stem or "data"


def as_line(row: Row) -> str:
    """A row as a line of JSONL, its text as it is read: not escaped."""
    return json.dumps(row, ensure_ascii=False, default=repr) + "\n"


def write_rows(path: Path, rows: Sequence[Row], form: str = "jsonl") -> None:
    """Writes jsonl, parquet, or csv (with lists and objects as JSON), and makes the folder.

    csv and parquet need rows with the same columns. DataError when it is not possible.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if form == "parquet":
            table = _need("pyarrow", path).Table.from_pylist(rows)
            _need("pyarrow.parquet", path).write_table(table, path)
        elif form == "csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(rows[0])
                writer.writerows(map(_cell, row.values()) for row in rows)
        else:
            path.write_text("".join(map(as_line, rows)), encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}); give another place"
        ) from None


def _cell(value: Any) -> Any:
    nested = isinstance(value, list | dict)
    return json.dumps(value, ensure_ascii=False) if nested else value


def _file(path: Path) -> Iterator[Located]:
    if path.suffix == ".parquet":
        yield from _table(_parquet(path), str(path))
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}; convert it to JSONL") from None
    # Only "\n" ends a line: JSON text may hold other line separators, e.g. U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _parse(line: str, where: str) -> Row | DataError:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return DataError(f"{where} is not JSON: {error}; each line must be one object")
    if not isinstance(row, dict):
        return DataError(
            f"{where} holds {shown(row)}, not an object; "
            'write rows like {"prompt": "...", "answer": "..."}'
        )
    for item in row.items() if SUSPECT.search(line) else ():
        try:
            msgpack.packb(item)  # as the codec will
        except (OverflowError, ValueError):
            return DataError(
                f"{where}: column {item[0]!r} holds {shown(item[1])}, which cannot be sent to "
                "another process: integers must fit into 64 bits, text must be whole Unicode "
                "characters; write the number as text, or remove it"
            )
    return row


def _parquet(path: Path) -> Any:
    """Its Arrow table."""
    try:
        return _need("pyarrow.parquet", path).read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these
        raise DataError(f"{path} is not a Parquet file: {error}; write it anew") from None


def _table(table: Any, name: str) -> Iterator[Located]:
    """Rows of an Arrow table; dates and decimals become text, which every reward can take."""
    for index, row in enumerate(table.to_pylist()):
        yield f"{name} row {index}", {key: _plain(value) for key, value in row.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if isinstance(value, PLAIN) else str(value)


def _folder(path: Path) -> list[Located]:
    if (path / SAVED).is_file():
        return dataset_rows(_need("datasets", path).load_from_disk(str(path)), str(path))
    if (path / SAVED_SPLITS).is_file():
        splits = json.loads((path / SAVED_SPLITS).read_text(encoding="utf-8")).get("splits", [])
        raise DataError(
            f"{path} holds the splits {', '.join(splits)}; give one of them: {path / splits[0]}"
        )
    files = sorted(file for pattern in FILE_PATTERNS for file in path.rglob(pattern))
    if not files:
        raise DataError(
            f"folder {path} holds no {' or '.join(FILE_PATTERNS)} files and was not written by "
            "save_to_disk"
        )
    return [row for file in files for row in _file(file)]


def _from_hub(text: str, name: str, config: str | None, split: str | None) -> list[Located]:
    missing = f"{text} is no file or folder here"
    datasets = _need("datasets", missing)
    try:
        dataset = datasets.load_dataset(name, config, split=split or "train")
    except Exception as error:  # the hub's client raises many kinds; all of them mean this
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise AbsentData(
            f"{missing}, and as a data set of the hub it cannot be loaded ({reason}); offline, "
            "give a local file or a folder written by save_to_disk; online, check the name and "
            "that HF_HUB_OFFLINE is not set"
        ) from None
    return dataset_rows(dataset, text)


def _need(module: str, wanted: object) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(
            f"{wanted}: this needs the package {module.partition('.')[0]}, which is not "
            "installed; pip install 'asyncgrpo[data]', or use JSONL"
        ) from None


def _neighbours(path: Path) -> str:
    near = sorted(str(found) for pattern in FILE_PATTERNS for found in path.parent.glob(pattern))
    return f"there are: {', '.join(near[:5])}" if near else "check the path"
