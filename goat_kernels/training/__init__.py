"""Training with any trainer: the balance loss, router statistics and a callback for transformers.Trainer."""

from typing import TYPE_CHECKING

from goat_kernels.training.balance import attach_balance_scale, balance_scales, detach_balance_scale
from goat_kernels.training.report import RouterReport, RouterStatistics, router_report, router_statistics

if TYPE_CHECKING:
    from goat_kernels.training.callback import GoatCallback
else:  # a type checker would take it to mean that every name exists

    def __getattr__(name: str):
        # The callback's base class needs transformers, which takes seconds to import and is not needed for the rest.
        if name == "GoatCallback":
            from goat_kernels.training.callback import GoatCallback

            return GoatCallback
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "GoatCallback",
    "RouterReport",
    "RouterStatistics",
    "attach_balance_scale",
    "balance_scales",
    "detach_balance_scale",
    "router_report",
    "router_statistics",
]
