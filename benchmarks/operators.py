"""What a step of pre-training spends its time on, operator by operator: where there is still something to gain."""

from __future__ import annotations

from itertools import product

import torch

from benchmarks.harness import Report, Table
from benchmarks.pretraining_step import OURS, OURS_BF16, Row, Trainers
from benchmarks.samples import masked_batch

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "linear", "mkldnn_linear", "mkl_linear"),
    "attention": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "GELU, LayerNorm": ("gelu", "gelu_backward", "native_layer_norm", "native_layer_norm_backward"),
    "dropout's draws": ("bernoulli_", "random_", "ge"),
    "AdamW, clipping": ("_fused_adamw_", "linalg_vector_norm", "_foreach_norm", "_foreach_mul_"),
    "copies, casts": ("copy_", "cat", "index_select", "index_add_"),
    "sums, products, fills": ("add", "add_", "mul", "mul_", "div_", "sum", "fill_"),
}
"""torch's names of the operators that a step consists of."""


def shares(size: str, row: Row) -> dict[str, float]:
    """Kind → its share of the time of a step; *the rest* is Python, other operators, and the time between."""
    trainers = Trainers(size)
    trainers.prepare(row)
    batch = masked_batch(row.seconds, row.config(size))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        trainers.step(row, batch)
    total = 1e6 * sum(trainers.parts[row][-1])
    own = {each.key.removeprefix("aten::"): each.self_cpu_time_total for each in profiler.key_averages()}
    found = {kind: sum(own.get(name, 0.0) for name in names) / total for kind, names in KINDS.items()}
    return found | {"the rest": 1 - sum(found.values())}


def main(quick: bool) -> Report:
    """Sizes base and mini in both precisions, six utterances; `quick`: nano, shorter ones."""
    report = Report("operators")
    sizes, scale = (("nano",), 0.1) if quick else (("base", "mini"), 1.0)
    lines = []
    for size, row in product(sizes, (OURS, OURS_BF16)):
        found = shares(size, row.scaled(scale))
        name = f"`{size}`, {row.name}"
        lines.append((name, *(f"{100 * share:.0f} %" for share in found.values())))
        report.measured[name] = found
    report.tables.append(Table("Of the time of a step", ("", *KINDS, "the rest"), lines))
    report.notes.append("by torch's profiler, whose own time is part of *the rest*, as Python and small operators are")
    return report
