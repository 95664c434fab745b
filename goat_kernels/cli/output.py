"""The output folder: who may write to it, and what of an interrupted run is already there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from goat_kernels.command_errors import CommandError
from goat_kernels.files import remove_temporary, write_json
from goat_kernels.finetuning.options import FinetuneOptions

#: Marks a folder as this command's, and holds the options of its run.
RUN_FILE = "run.json"


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
        never touched.
        """
        root, options = self.root, self._options
        if root.exists() and not root.is_dir():
            raise CommandError(f"--output {str(root)!r} is a file; it needs a folder, or a name that is free")
        ours = (root / RUN_FILE).is_file()
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

    def _check_same_options(self) -> None:
        before = json.loads((self.root / RUN_FILE).read_text(encoding="utf-8"))["options"]
        now = self._options.fingerprint()
        for name in now:
            if before.get(name) != now[name]:
                raise CommandError(
                    f"--resume: --{name.replace('_', '-')} is {now[name]!r}, but the run in {str(self.root)!r} was "
                    f"started with {before.get(name)!r}; it needs the same options"
                )

    def claim(self) -> None:
        """Make the folder this run's: empty but for ``run.json``; or, resumed, without what a killed run half wrote.

        Raises:
            CommandError: nothing can be written there.
        """
        try:
            if self._options.resume:
                remove_temporary(self.root)
                return
            if self._options.overwrite and self.root.is_dir():
                shutil.rmtree(self.root)
            self.root.mkdir(parents=True, exist_ok=True)
            write_json(self.root / RUN_FILE, {"command": "finetune", "options": self._options.fingerprint()})
        except OSError as error:
            raise CommandError(
                f"--output {str(self.root)!r} cannot be written to ({error.strerror}); it needs a folder that can"
            ) from None

    def method(self, name: str) -> Path:
        """The folder of one method, made if need be."""
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        return folder
