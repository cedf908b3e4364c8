"""What a step of pre-training spends its time on, operator by operator: where there is still something to gain."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import torch

from benchmarks.harness import CPU, Report, Table, is_timed
from benchmarks.pretraining_step import OURS, OURS_BF16, Row, Trainers
from ctal.processes import keep_freed_memory

KINDS = {
    "matrix products": ("mm", "addmm", "linear", "mkldnn_linear", "mkl_linear"),
    "attention": (
        *("bmm", "_softmax", "_softmax_backward_data"),
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_flash_attention_forward",
        "_flash_attention_backward",
    ),
    "GELU, LayerNorm": ("gelu", "gelu_backward", "native_layer_norm", "native_layer_norm_backward"),
    "dropout's draws": ("bernoulli_", "random_", "ge", "native_dropout", "native_dropout_backward"),
    "AdamW, clipping": ("_fused_adamw_", "linalg_vector_norm", "_foreach_norm", "_foreach_mul_"),
    "copies, casts": ("copy_", "cat", "index_select", "index_add_", "gather", "scatter_add_"),
    "sums, products, fills": ("add", "add_", "mul", "mul_", "div_", "sum", "fill_"),
}
"""torch's names of the operators that a step consists of."""


def shares(size: str, row: Row, device: torch.device = CPU) -> dict[str, float]:
    """Kind → its share of the time of a step; *the rest* is other operators, and the time between: on a CPU Python, on
    a GPU what it waits."""
    trainers = Trainers(size, device)
    trainers.prepare(row)
    batch = trainers.batch(row)
    trainers.step(row, batch)
    of_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA] if of_gpu else [activity.CPU]) as profiler:
        trainers.step(row, batch)
    total = 1e6 * sum(trainers.parts[row][-1])
    own = {
        each.key.removeprefix("aten::"): each.self_device_time_total if of_gpu else each.self_cpu_time_total
        for each in profiler.key_averages()
    }
    found = {kind: sum(own.get(name, 0.0) for name in names) / total for kind, names in KINDS.items()}
    return found | {"the rest": 1 - sum(found.values())}


def shares_table(found: Mapping[str, Mapping[str, float]]) -> Table:
    lines = [(name, *(f"{100 * share:.0f} %" for share in each.values())) for name, each in found.items()]
    return Table("Of the time of a step", ("", *KINDS, "the rest"), lines)


def main(quick: bool) -> Report:
    """Sizes base and mini in both precisions, six utterances; `quick`: nano, shorter ones."""
    report = Report("operators")
    keep_freed_memory({})  # as training does
    sizes, scale = (("nano",), 0.1) if quick else (("base", "mini"), 1.0)
    rows = [row for row in (OURS, OURS_BF16) if is_timed(row.precision, quick)]
    found = {f"`{size}`, {row.name}": shares(size, row.scaled(scale)) for size, row in product(sizes, rows)}
    report.measured |= found
    report.tables.append(shares_table(found))
    report.notes.append("by torch's profiler, whose own time is part of *the rest*, as Python and small operators are")
    return report
