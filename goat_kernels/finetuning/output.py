"""The output folder: whether a run may write to it, and what of an earlier run is removed from it.

::

    run.json                   the options of the run
    <method>/checkpoints/      while the method trains
    <method>/adapter/          the trained adapter; model/ for head and full
    <method>/trained.json      the record of the training, written when the adapter is complete
    <method>/result.json       written when the method is done
    results.json, results.png  written at the end
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path

from goat_kernels.command_errors import CommandError
from goat_kernels.files import SAVING, write_json
from goat_kernels.finetuning.data import looks_like_path
from goat_kernels.finetuning.methods import METHODS
from goat_kernels.finetuning.options import FinetuneOptions

#: Marks a folder as this command's, and holds the options of its run.
RUN_FILE = "run.json"

_METHOD = f"({'|'.join(METHODS)})"
_ADAPTER = r"adapter_config\.json|adapter_model\.(safetensors|bin)|README\.md"
_MODEL = r"(generation_)?config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
_TRAINER = r"optimizer\.(pt|bin)|(scheduler|scaler)\.pt|rng_state.*\.pth|trainer_state\.json|training_args\.bin"
_CHECKPOINT = r"checkpoints/(tmp-)?checkpoint-\d+"

#: Every folder, and every file, that this command, PEFT and transformers write, from the output folder on.
_FOLDERS = re.compile(rf"{_METHOD}(/(adapter|model|checkpoints|{_CHECKPOINT}))?")
_FILES = re.compile(
    rf"{re.escape(RUN_FILE)}|results\.(json|png)|{_METHOD}/(trained|result)\.json|{_METHOD}/adapter/({_ADAPTER})"
    rf"|{_METHOD}/model/({_MODEL})|{_METHOD}/{_CHECKPOINT}/({_ADAPTER}|{_MODEL}|{_TRAINER})"
)

#: What a killed process leaves of a file or folder that it was writing (``goat_kernels.files``).
_TEMPORARY = re.compile(rf"(?P<saving>{re.escape(SAVING)}.*\.tmp)|\.(?P<name>.+)\.[0-9a-f]+\.tmp")


def check_output(root: Path, options: FinetuneOptions) -> None:
    """Raise CommandError unless the run may go ahead; changes nothing.

    An existing run needs --resume (with the same options) or --overwrite; another folder with anything in it is never
    touched. The model and the data must lie outside the folder, and the folder outside of them.
    """
    _check_apart_from_inputs(root, options)
    if root.exists() and not root.is_dir():
        raise CommandError(f"--output {str(root)!r} is a file; it needs a folder, or a name that is free")
    ours = (root / RUN_FILE).is_file()
    if ours and (options.resume or options.overwrite):
        for path in _paths(root):
            found, needed = ("folder" if path.is_dir() else "file"), _kind(path, root)
            if needed is not None and found != needed and not path.is_symlink():
                raise CommandError(
                    f"--output: {str(path)!r} is a {found}, and this command writes a {needed} of that name; it needs "
                    "another name"
                )
    if options.resume:
        if not ours:
            raise CommandError(f"--resume: --output {str(root)!r} holds no run to go on with")
        _check_same_options(root, options)
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
        # Trainer removes old checkpoints whole, so nothing else may be in them.
        for path in _foreign(root):
            if "checkpoints" in path.relative_to(root).parts[1:2]:
                raise CommandError(
                    f"--overwrite: {str(path)!r} was not written by this command and lies where its checkpoints go; "
                    "it needs another place"
                )


def claim_output(root: Path, options: FinetuneOptions) -> None:
    """Make the folder this run's.

    With --overwrite what an earlier run wrote is removed and what else is there stays, which a line says; resumed, what
    a killed run half wrote is removed.

    Raises:
        CommandError: nothing can be written there.
    """
    try:
        if options.resume or options.overwrite:
            kept = [str(path.relative_to(root)) for path in _foreign(root)]
            for path in _paths(root):
                half_written = any(map(_TEMPORARY.fullmatch, path.relative_to(root).parts))
                if _kind(path, root) is None or not (options.overwrite or half_written):
                    continue
                if path.is_symlink() or not path.is_dir():
                    path.unlink()
                else:
                    with contextlib.suppress(OSError):  # not empty: something in it is not ours
                        path.rmdir()
        if options.resume:
            return
        if options.overwrite and kept:
            more = f" and {len(kept) - 5} more" if len(kept) > 5 else ""
            print(f"kept in {root}, because this command did not write it: {', '.join(kept[:5])}{more}")
        root.mkdir(parents=True, exist_ok=True)
        write_json(root / RUN_FILE, {"command": "finetune", "options": options.fingerprint()})
    except OSError as error:
        raise CommandError(
            f"--output {str(root)!r} cannot be written to ({error.strerror}); it needs a folder that can"
        ) from None


def _check_apart_from_inputs(root: Path, options: FinetuneOptions) -> None:
    output = root.resolve()
    for option, source in (("--data", options.data), ("--eval-data", options.eval_data), ("--model", options.model)):
        if source is None or not looks_like_path(source):
            continue
        path = Path(source).expanduser().resolve()
        if path == output or output in path.parents:
            raise CommandError(
                f"{option} {source!r} lies in --output {str(root)!r}; it needs a place outside of what this command "
                "writes"
            )
        if path in output.parents:
            raise CommandError(
                f"--output {str(root)!r} lies in {option} {source!r}; it needs a place outside of what is read"
            )


def _check_same_options(root: Path, options: FinetuneOptions) -> None:
    before = json.loads((root / RUN_FILE).read_text(encoding="utf-8"))["options"]
    for name, now in options.fingerprint().items():
        if name not in before and not now:
            continue  # an option that is newer than the run, and not used
        if before.get(name) != now:
            raise CommandError(
                f"--resume: --{name.replace('_', '-')} is {now!r}, but the run in {str(root)!r} was started with "
                f"{before.get(name)!r}; it needs the same options"
            )


def _paths(root: Path) -> list[Path]:
    """All files, links and folders in the folder, each folder behind what is in it."""
    walk = os.walk(root, topdown=False)
    return [Path(folder, name) for folder, folders, files in walk for name in (*files, *folders)]


def _foreign(root: Path) -> list[Path]:
    """Files and links in the folder that this command did not write."""
    files = [path for path in _paths(root) if (path.is_symlink() or not path.is_dir()) and _kind(path, root) is None]
    return sorted(files, key=lambda path: (len(path.parts), path))


def _kind(path: Path, root: Path) -> str | None:
    """ "file" or "folder", whichever this command writes under that name, complete or temporary; None where neither."""
    parts = []
    for part in path.relative_to(root).parts:
        temporary = _TEMPORARY.fullmatch(part)
        parts += [part] if temporary is None else [temporary["name"]] * (temporary["saving"] is None)
    name = "/".join(parts)
    return "file" if _FILES.fullmatch(name) else "folder" if _FOLDERS.fullmatch(name) else None
