"""Trackers: readers of a run's metrics stream, off unless asked for, never asked for in vain."""

import importlib
import importlib.util
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from vpmoe.config import Config
from vpmoe.errors import RunError
from vpmoe.train.hooks import Observer, Row


class _Tracker(Config):
    module: ClassVar[str]

    def require(self) -> ModuleType:
        """The tracker's library.

        Raises:
            RunError: If it is not installed.
        """
        name = self.module.split(".")[0]
        if importlib.util.find_spec(name) is None:
            raise RunError(
                f"a {name} tracker was asked for, and {name} is not installed",
                hint=f"pip install {name}, or take it out of trackers",
            )
        return importlib.import_module(self.module)

    @abstractmethod
    def build(self) -> Observer:
        """The observer to add to a run."""


class TensorBoardConfig(_Tracker):
    """TensorBoard event files inside the run's folder."""

    kind: Literal["tensorboard"] = "tensorboard"
    folder: str = "tensorboard"
    """Folder of the event files, inside the run's."""

    module: ClassVar[str] = "tensorboard"

    def build(self) -> Observer:
        """The observer to add to a run."""
        self.require()
        return _TensorBoard(self)


class TrackioConfig(_Tracker):
    """A local trackio database."""

    kind: Literal["trackio"] = "trackio"
    project: str = "vpmoe"
    """Project that the run is listed under."""

    module: ClassVar[str] = "trackio"

    def build(self) -> Observer:
        """The observer to add to a run."""
        return _RunTracker(self.require(), self.project, {"embed": False})


class WandbConfig(_Tracker):
    """Weights & Biases."""

    kind: Literal["wandb"] = "wandb"
    project: str = "vpmoe"
    """Project that the run is listed under."""
    mode: Literal["online", "offline"] = "offline"
    """offline writes files to be uploaded later."""

    module: ClassVar[str] = "wandb"

    def build(self) -> Observer:
        """The observer to add to a run."""
        return _RunTracker(self.require(), self.project, {"mode": self.mode}, id_key="id")


TrackerConfig = Annotated[
    TensorBoardConfig | TrackioConfig | WandbConfig, Field(discriminator="kind")
]


class _TensorBoard:
    """Scalars by step; lines that a resumed run writes again replace the old ones."""

    def __init__(self, config: TensorBoardConfig) -> None:
        self._config = config

    def start(self, run_dir: Path, config: Mapping[str, Any], *, step: int, num_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # pulls in all of tensorboard

        del config, num_steps
        folder = run_dir / self._config.folder
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def row(self, step: int, values: Row) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _RunTracker:
    """Libraries with wandb's three calls: init, log, finish.

    Args:
        library: The module.
        project: Project that the run is listed under.
        options: Further arguments of its `init`.
        id_key: Argument of `init` that names the run to go on with.
    """

    def __init__(
        self,
        library: ModuleType,
        project: str,
        options: Mapping[str, Any],
        *,
        id_key: str = "name",
    ) -> None:
        self._library = library
        self._project = project
        self._options = options
        self._id_key = id_key

    def start(self, run_dir: Path, config: Mapping[str, Any], *, step: int, num_steps: int) -> None:
        del num_steps
        self._run = self._library.init(
            project=self._project,
            config=dict(config),
            resume="allow" if step else "never",
            **{"name": run_dir.name, self._id_key: run_dir.name, **self._options},
        )

    def row(self, step: int, values: Row) -> None:
        self._library.log(dict(values), step=step)

    def close(self) -> None:
        self._library.finish()
