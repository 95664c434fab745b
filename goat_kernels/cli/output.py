"""The output folder: who may write to it, what of an interrupted run is already there, and what --overwrite removes."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from goat_kernels.command_errors import CommandError
from goat_kernels.files import write_json
from goat_kernels.finetuning.data import looks_like_path
from goat_kernels.finetuning.methods import METHODS
from goat_kernels.finetuning.options import FinetuneOptions

#: Marks a folder as this command's, and holds the options of its run.
RUN_FILE = "run.json"

#: Stand for every method's folder and every checkpoint's; no file can have these names.
_METHOD, _CHECKPOINT = "<method>/", "checkpoint-<step>/"

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md")
_PART = f"model-{'[0-9]' * 5}-of-{'[0-9]' * 5}.safetensors"
_MODEL_FILES = (
    *("config.json", "generation_config.json"),
    *("model.safetensors", _PART, "model.safetensors.index.json"),
)
_TRAINER_FILES = (
    *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
    *("trainer_state.json", "training_args.bin"),
)

#: Every file that this command, PEFT and transformers write: folder, from the output folder on -> names in it.
_WRITTEN: dict[tuple[str, ...], tuple[str, ...]] = {
    (): (RUN_FILE, "results.json", "results.png"),
    (_METHOD,): ("trained.json", "result.json"),
    (_METHOD, "adapter"): _ADAPTER_FILES,
    (_METHOD, "model"): _MODEL_FILES,
    (_METHOD, "checkpoints"): (),
    (_METHOD, "checkpoints", _CHECKPOINT): (*_ADAPTER_FILES, *_MODEL_FILES, *_TRAINER_FILES),
}

#: What a killed process leaves of a file or folder that it was writing.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]+\.tmp")
_SAVING_IN_PLACE = ".goat-save.*.tmp"


class OutputFolder:
    """Paths inside ``--output``.

    ::

        run.json                   the options of the run
        <method>/checkpoints/      while the method trains
        <method>/adapter/          the trained adapter of lora and goat; model/ for head and full
        <method>/trained.json      the record of the training, written when the adapter is complete
        <method>/result.json       written when the method is done
        results.json, results.png  written at the end
    """

    def __init__(self, options: FinetuneOptions) -> None:
        self.root = Path(options.output).expanduser()
        self._options = options

    def check(self) -> None:
        """Raise CommandError unless the run may go ahead; changes nothing.

        An existing run needs --resume (with the same options) or --overwrite; another folder with anything in it is
        never touched. The model and the data must lie outside the folder, and the folder outside of them.
        """
        root, options = self.root, self._options
        self._check_apart_from_inputs()
        if root.exists() and not root.is_dir():
            raise CommandError(f"--output {str(root)!r} is a file; it needs a folder, or a name that is free")
        ours = (root / RUN_FILE).is_file()
        if ours and (options.resume or options.overwrite):
            self._check_kinds()
        if options.resume:
            if not ours:
                raise CommandError(f"--resume: --output {str(root)!r} holds no run to go on with")
            self._check_same_options()
        elif root.is_dir() and any(root.iterdir()):
            if not ours:
                raise CommandError(
                    f"--output {str(root)!r} exists and was not made by this command; it needs a name that is free"
                )
            if not options.overwrite:
                raise CommandError(
                    f"--output {str(root)!r} has results already; it needs --overwrite to replace them, --resume to go "
                    "on with an interrupted run, or another name"
                )
            self._check_checkpoints()

    def _check_apart_from_inputs(self) -> None:
        output = self.root.resolve()
        data = self._options.data
        for option, source in (("--data", data.data), ("--eval-data", data.eval_data), ("--model", data.model)):
            if source is None or not looks_like_path(source):
                continue
            path = Path(source).expanduser().resolve()
            if path == output or output in path.parents:
                raise CommandError(
                    f"{option} {source!r} lies in --output {str(self.root)!r}; it needs a place outside of what this "
                    "command writes"
                )
            if path in output.parents:
                raise CommandError(
                    f"--output {str(self.root)!r} lies in {option} {source!r}; it needs a place outside of what is read"
                )

    def _check_kinds(self) -> None:
        """No folder may lie where a file goes, which nothing here may remove, and no file where a folder goes."""
        for path in self._paths():
            parts = _general_parts(path, self.root)
            if not parts or path.is_symlink():
                continue
            is_folder, needs_folder = path.is_dir(), parts in _WRITTEN
            if is_folder != needs_folder and (needs_folder or _is_ours(path, self.root)):
                found, needed = ("folder", "file") if is_folder else ("file", "folder")
                raise CommandError(
                    f"--output: {str(path)!r} is a {found}, and this command writes a {needed} of that name; it needs "
                    "another name"
                )

    def _check_checkpoints(self) -> None:
        """Trainer removes old checkpoints whole, so nothing else may be in them."""
        foreign = [path for path in self._foreign() if "checkpoints" in path.relative_to(self.root).parts[1:2]]
        if foreign:
            raise CommandError(
                f"--overwrite: {str(foreign[0])!r} was not written by this command and lies where its checkpoints go; "
                "it needs another place"
            )

    def _foreign(self) -> list[Path]:
        """Files and links in the folder that this command did not write."""
        files = [path for path in self._paths() if path.is_symlink() or not path.is_dir()]
        return sorted(
            (path for path in files if not _is_ours(path, self.root)), key=lambda path: (len(path.parts), path)
        )

    def _paths(self) -> list[Path]:
        """All files, links and folders in the folder, each folder behind what is in it."""
        walk = os.walk(self.root, topdown=False)
        return [Path(folder, name) for folder, folders, files in walk for name in (*files, *folders)]

    def _check_same_options(self) -> None:
        before = json.loads((self.root / RUN_FILE).read_text(encoding="utf-8"))["options"]
        now = self._options.fingerprint()
        for name in now:
            if name not in before and not now[name]:
                continue  # an option that is newer than the run, and not used
            if before.get(name) != now[name]:
                raise CommandError(
                    f"--resume: --{name.replace('_', '-')} is {now[name]!r}, but the run in {str(self.root)!r} was "
                    f"started with {before.get(name)!r}; it needs the same options"
                )

    def claim(self) -> None:
        """Make the folder this run's.

        With --overwrite what an earlier run wrote is removed and what else is there stays, which a line says; resumed,
        what a killed run half wrote is removed.

        Raises:
            CommandError: nothing can be written there.
        """
        try:
            if self._options.resume:
                self._remove_ours(lambda path: any(map(_is_temporary, path.relative_to(self.root).parts)))
                return
            if self._options.overwrite and self.root.is_dir():
                self._remove_earlier_run()
            self.root.mkdir(parents=True, exist_ok=True)
            write_json(self.root / RUN_FILE, {"command": "finetune", "options": self._options.fingerprint()})
        except OSError as error:
            raise CommandError(
                f"--output {str(self.root)!r} cannot be written to ({error.strerror}); it needs a folder that can"
            ) from None

    def _remove_earlier_run(self) -> None:
        kept = self._foreign()
        self._remove_ours(lambda path: True)
        if kept:
            names = ", ".join(str(path.relative_to(self.root)) for path in kept[:5])
            more = f" and {len(kept) - 5} more" if len(kept) > 5 else ""
            print(f"kept in {self.root}, because this command did not write it: {names}{more}")

    def _remove_ours(self, chosen: Callable[[Path], bool]) -> None:
        """Remove what this command wrote of the paths for which ``chosen`` is true."""
        for path in self._paths():
            if not chosen(path) or not _is_ours(path, self.root):
                continue
            if path.is_symlink() or not path.is_dir():
                path.unlink()
            else:
                with contextlib.suppress(OSError):  # not empty: something in it is not ours
                    path.rmdir()

    def method(self, name: str) -> Path:
        """The folder of one method, made if need be."""
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        return folder


def _is_ours(path: Path, root: Path) -> bool:
    """Whether this command writes something of that name at that place; a symbolic link is judged by its own name."""
    parts = _general_parts(path, root)
    if path.is_dir() and parts in _WRITTEN:
        return True
    return bool(parts) and any(fnmatch.fnmatchcase(parts[-1], pattern) for pattern in _WRITTEN.get(parts[:-1], ()))


def _general_parts(path: Path, root: Path) -> tuple[str, ...]:
    """The names from ``root`` on, as the keys of ``_WRITTEN`` have them."""
    below = path.relative_to(root).parts
    parts = tuple(_general_name(part) for part in below if not fnmatch.fnmatchcase(part, _SAVING_IN_PLACE))
    return (_METHOD, *parts[1:]) if parts and parts[0] in METHODS else parts


def _is_temporary(name: str) -> bool:
    return _TEMPORARY.fullmatch(name) is not None


def _general_name(name: str) -> str:
    """Without what a temporary name adds, and without the number of a checkpoint."""
    temporary = _TEMPORARY.fullmatch(name)
    name = temporary["name"] if temporary else name
    return _CHECKPOINT if re.fullmatch(r"(tmp-)?checkpoint-\d+", name) else name
