"""The Optuna study that `lightning-surge sweep` keeps, as a table of runs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_surge.checking.libraries import needed

if TYPE_CHECKING:
    import pandas as pd
    from optuna.trial import FrozenTrial


COLUMNS = ("batch_size", "lr", "loss", "steps", "examples", "seed", "target", "status", "seconds")


def shown(where: str) -> str:
    """A file or URL without the password in it."""
    return re.sub(r"(://[^:/]*):[^@/]*@", r"\1:***@", where)


def local_file(where: str) -> Path | None:
    """The file of a journal, or of SQLite's database; None for a database elsewhere."""
    if "://" not in where:
        return Path(where)
    return Path(where.partition("///")[2].partition("?")[0]) if where.startswith("sqlite") else None


def is_study(where: str) -> bool:
    """Whether it is the URL of a database, or a file that begins as a journal of Optuna does."""
    if "://" in where:
        return True
    path = Path(where)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(10) == b'{"op_code"'


def read_study(where: str) -> pd.DataFrame:
    """Read the trials of a study, one a row; if there are several studies, a column has their names."""
    with needed("Reading a study needs Optuna and pandas", "'lightning-surge[sweep]'"):
        import optuna
        import pandas
        from optuna.storages import BaseStorage, JournalStorage, RDBStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
    file, said = local_file(where), shown(where)
    if file is not None and not file.is_file():
        raise ValueError(f"Expected an existing study, got {said!r}: check the path.")
    try:
        storage: BaseStorage
        if "://" in where:
            storage = RDBStorage(where, skip_table_creation=True)
        else:
            storage = JournalStorage(JournalFileBackend(where, JournalFileOpenLock(where)))
        studies = [
            optuna.load_study(study_name=s.study_name, storage=storage) for s in storage.get_all_studies()
        ]
    except Exception as error:  # of whatever driver the URL names
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"Expected an Optuna study in {said!r}, got {first}: check the URL.") from error
    if not studies:
        raise ValueError(f"Expected an Optuna study in {said!r}, got none: run the sweep first.")
    rows = []
    for study in studies:
        name = {"study": study.study_name} if len(studies) > 1 else {}
        rows += [row | name for row in study_rows(study.get_trials(deepcopy=False))]
    frame = pandas.DataFrame(rows)
    # Whether larger losses are better.
    frame.attrs["maximize"] = all(study.direction.name == "MAXIMIZE" for study in studies)
    return frame


def study_rows(trials: Iterable[FrozenTrial]) -> list[dict[str, Any]]:
    """Rows of the cells that have ended, sorted: one for each target loss, with the steps to it."""
    ended = {}
    for trial in trials:
        if (outcome := trial.user_attrs.get("outcome")) is not None:
            seconds = trial.duration.total_seconds() if trial.duration else 0.0
            # A cell that was run again has several trials: the last one counts.
            ended[tuple(trial.params.values())] = {**trial.params, **outcome, "seconds": round(seconds, 2)}
    targets = sorted({entry[0] for row in ended.values() for entry in row["reached"]}, reverse=True)
    return [row for _, values in sorted(ended.items()) for row in _rows_of(values, targets)]


def _rows_of(values: dict[str, Any], targets: list[float]) -> Iterable[dict[str, Any]]:
    if not targets:
        yield {name: values[name] for name in COLUMNS if name != "target"}
    reached = {target: (steps, examples) for target, steps, examples in values["reached"]}
    for target in targets:
        steps, examples = reached.get(target, (None, None))
        missed = values["status"] == "finished" and steps is None
        told = {"target": target, "steps": steps, "examples": examples}
        row = values | told | ({"status": "not_reached"} if missed else {})
        yield {name: row[name] for name in COLUMNS}


def write_study(trials: Iterable[FrozenTrial], path: Path) -> None:
    """Write the table of a sweep; whoever reads it meanwhile sees the old one or the new one."""
    import pandas

    rows = study_rows(trials)
    columns = [name for name in COLUMNS if name != "target" or (rows and name in rows[0])]
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.parent.mkdir(parents=True, exist_ok=True)
    pandas.DataFrame(rows, columns=columns, dtype=object).to_csv(draft, index=False)
    os.replace(draft, path)
