"""Turn adapters of other code into adapters of this package, or a GOAT adapter into an approximate plain LoRA.

What SOURCE is, its configuration says: an adapter of the GOAT-PEFT repository, a LoRA or PiSSA adapter of PEFT, or,
with --to-lora-approximate, an adapter of this package.

    goat-kernels convert SOURCE OUTPUT --base-model MODEL --scaling lora     GOAT-PEFT; its file lacks the scaling
    goat-kernels convert SOURCE OUTPUT                                       PEFT's LoRA, as one expert
    goat-kernels convert SOURCE OUTPUT --base-model MODEL                    PiSSA, saved without PEFT's conversion
    goat-kernels convert SOURCE OUTPUT --base-model MODEL --to-lora-approximate --inputs inputs.safetensors

The last gives every token the same gates, which is not what GOAT computes: its error on the inputs is printed, and
stored in lora_approximation.json beside the adapter. Exit code: 0 if the adapter was written.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from goat_kernels.command_errors import CommandError, one_line
from goat_kernels.finetuning.options import name_or_number, number

#: task_type -> transformers' class; another task takes the class that the model's own configuration names.
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare every option of ``goat-kernels convert``."""
    parser.add_argument("source", metavar="SOURCE", help="folder of the adapter")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write; must not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace the adapter in an existing OUTPUT")
    parser.add_argument("--base-model", metavar="MODEL", help="folder or id of the pretrained model")
    parser.add_argument(
        "--scaling", type=name_or_number, help="GOAT-PEFT: s of the training: lora, rslora, goat or a number"
    )
    parser.add_argument("--eta", type=number(above=0), default=1.0, help="GOAT-PEFT: ETA of the training (%(default)s)")
    parser.add_argument(
        "--rho", type=number(above=0), default=10.0, help="GOAT-PEFT: rho of the training (%(default)s)"
    )
    parser.add_argument("--initial-adapter", metavar="FOLDER", help="PiSSA: the adapter as it was before training")
    parser.add_argument(
        "--residual-base", action="store_true", help="PiSSA: for use on the changed base, so nothing is subtracted"
    )
    parser.add_argument(
        "--to-lora-approximate", action="store_true", help="an approximate plain LoRA of an adapter of this package"
    )
    parser.add_argument("--inputs", metavar="FILE", help="with it: a safetensors file of the model's named inputs")
    parser.add_argument("--gates", choices=("mean", "uniform"), default="mean", help="with it: gates (%(default)s)")
    parser.add_argument("--allow-pickle", action="store_true", help="read a .bin file, with weights_only=True")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; CommandError for a source that cannot be converted, or an output that exists."""
    source = f"SOURCE {arguments.source!r}"
    try:
        fields = json.loads((Path(arguments.source) / "adapter_config.json").read_text(encoding="utf-8"))
    except OSError:
        raise CommandError(f"{source} has no adapter_config.json; it needs the folder of an adapter") from None
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{source}: adapter_config.json is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise CommandError(f"{source}: adapter_config.json is not a JSON object")
    if Path(arguments.output).exists() and not arguments.overwrite:
        raise CommandError(f"OUTPUT {arguments.output!r} exists; name a new folder, or pass --overwrite")
    ours = fields.get("peft_type") == "GOAT" and "init_type" not in fields
    if ours and not arguments.to_lora_approximate:
        raise CommandError(f"{source} is an adapter of this package; did you mean --to-lora-approximate?")
    if arguments.to_lora_approximate and not ours:
        raise CommandError(f"--to-lora-approximate needs an adapter of this package, and {source} is another")
    if ours and (arguments.inputs is None or arguments.base_model is None):
        raise CommandError("--to-lora-approximate needs --base-model and --inputs, on which its error is measured")
    try:
        (_approximate if ours else _convert)(arguments, fields)
    except (ValueError, TypeError, OSError) as error:
        raise CommandError(one_line(error, None)) from None
    return 0


def _convert(arguments: argparse.Namespace, fields: dict) -> None:
    from goat_kernels.peft.convert import from_goat_peft, from_lora

    options = {"base_model": _base_model(arguments, fields), "allow_pickle": arguments.allow_pickle}
    if fields.get("peft_type") == "GOAT":
        options |= {"scaling": arguments.scaling, "eta": arguments.eta, "rho": arguments.rho}
        adapter = from_goat_peft(arguments.source, **options)
    else:
        options |= {"initial_adapter": arguments.initial_adapter, "on_residual_base": arguments.residual_base}
        adapter = from_lora(arguments.source, **options)
    adapter.save(arguments.output, overwrite=arguments.overwrite)
    print(f"{len(adapter.tensors)} tensors written to {arguments.output}; import goat_kernels.peft to load it")


def _approximate(arguments: argparse.Namespace, fields: dict) -> None:
    from peft import PeftModel
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from goat_kernels.peft.convert import REPORT_FILE, export_approximate_lora

    try:
        inputs = load_file(arguments.inputs)
    except (SafetensorError, OSError) as error:
        raise CommandError(f"--inputs {arguments.inputs!r} is no readable safetensors file ({error})") from None
    base = _base_model(arguments, fields)
    model = PeftModel.from_pretrained(base, arguments.source, allow_pickle=arguments.allow_pickle)
    report = export_approximate_lora(
        model, inputs, arguments.output, gates=arguments.gates, overwrite=arguments.overwrite
    )
    print(
        f"APPROXIMATE LoRA with {report['gates']} gates written to {arguments.output}. On these inputs its output "
        f"differs from GOAT's by {report['relative_error']:.2e} (relative; "
        f"{report['relative_error_without_adapter']:.2e} without any adapter); stored in {REPORT_FILE}"
    )


def _base_model(arguments: argparse.Namespace, fields: dict):
    if arguments.base_model is None:
        return None
    import transformers

    name = _CLASSES.get(fields.get("task_type"))
    if name is None:
        config = transformers.AutoConfig.from_pretrained(arguments.base_model)
        name = (fields.get("auto_mapping") or {}).get("base_model_class") or (config.architectures or ["AutoModel"])[0]
    return getattr(transformers, name, transformers.AutoModel).from_pretrained(arguments.base_model)
