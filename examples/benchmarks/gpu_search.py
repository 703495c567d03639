"""Exact search on a GPU, k = 53, beside what else there is; then the memory as a whole. `--help` says how."""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from _harness import features, markdown, show
from torch import Tensor

from lightning_resmem import LocalMemory, ResMemParams

K = 53
SIZES = (
    (1024, 1_000_000, 128),
    (1024, 1_000_000, 512),
    (8192, 1_000_000, 128),
    (256, 500_000, 64),
    (64, 1_000_000, 128),
    (1, 1_000_000, 128),
    (64, 10_000, 128),
    (1, 1_000, 128),
)
SMALL_SIZES = ((16, 3_000, 24), (1, 3_000, 24))
# Keys and queries of `--grid`, of width 128.
GRID = (1_000, 3_000, 10_000, 30_000, 100_000, 1_000_000, 10_000_000), (1, 4, 16, 64, 256, 1024, 8192)
SMALL_GRID = (500, 3_000), (1, 16)
# Scores that are written at once by those that write them.
SCORES = 2**30
# Queries that are compared with float64.
COMPARED = 32

Search = Callable[[], Tensor]
TableOf = tuple[str, list[str], list[list[str]]]  # title, header and rows


class Clock:
    """Median milliseconds, by the events of a GPU or by the clock of the host, and the peak of torch's memory."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds, self.is_gpu = device, rounds, device.type == "cuda"

    def milliseconds(self, run: Callable[[], object]) -> float:
        run()
        return statistics.median(self._once(run) for _ in range(self.rounds))

    def _once(self, run: Callable[[], object]) -> float:
        if not self.is_gpu:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak(self, run: Callable[[], object]) -> str:
        """MiB that a run takes for a while, beyond what is there before."""
        if not self.is_gpu:
            return "-"
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return f"{(torch.cuda.max_memory_allocated(self.device) - before) / 2**20:,.0f}"


def with_tf32(run: Callable[[], object]) -> Callable[[], object]:
    def inside() -> object:
        torch.set_float32_matmul_precision("high")
        try:
            return run()
        finally:
            torch.set_float32_matmul_precision("highest")

    return inside


def nearest_in_blocks(scores: Callable[[Tensor], Tensor], keys: Tensor, queries: Tensor) -> Tensor:
    blocks = queries.split(max(1, SCORES // len(keys)))
    return torch.cat([scores(block).topk(K, largest=False).indices for block in blocks])


def products(keys: Tensor, queries: Tensor) -> None:
    for block in queries.split(max(1, SCORES // len(keys))):
        block @ keys.T


def nearest_in_float64(keys: Tensor, queries: Tensor) -> Tensor:
    """Of each query, by direct differences."""
    found = []
    for query in queries.double():
        chunks = [(chunk.double() - query).square().sum(dim=1) for chunk in keys.split(2**18)]
        found.append(torch.cat(chunks).topk(K, largest=False).indices)
    return torch.stack(found)


def share_that_agrees(found: Tensor, right: Tensor) -> str:
    found = found[: len(right)].to(right.device).long()
    return f"{(found[:, :, None] == right[:, None]).any(dim=2).double().mean().item():.3%}"


def memory_of(keys: Tensor) -> LocalMemory:
    memory = LocalMemory(params=ResMemParams(k=K), index="exact").to(keys.device)
    memory.add(keys, torch.zeros(len(keys), 2, device=keys.device), torch.zeros(len(keys), device=keys.device).long())
    memory.build()
    return memory


def addmm_topk(keys: Tensor, queries: Tensor) -> Search:
    norms = keys.square().sum(dim=1)
    return lambda: nearest_in_blocks(lambda block: torch.addmm(norms, block, keys.T, alpha=-2), keys, queries)


def searches(keys: Tensor, queries: Tensor, memory: LocalMemory) -> dict[str, Search]:
    """What finds neighbours: each returns their positions, shape `(B, K)`."""
    addmm = addmm_topk(keys, queries)
    found: dict[str, Search] = {
        "ours": lambda: memory.search(queries, K).ids,
        "addmm + topk": addmm,
        "addmm + topk, TF32": with_tf32(addmm),
        "cdist + topk": lambda: nearest_in_blocks(lambda block: torch.cdist(block, keys), keys, queries),
    }
    return found | faiss_flat(keys, queries) | flashlib_knn(keys, queries)


def faiss_flat(keys: Tensor, queries: Tensor) -> dict[str, Search]:
    """FAISS's own exact search on the same GPU, if it is there; queries and neighbours stay on the GPU."""
    if keys.device.type != "cuda":
        return {}
    try:
        import faiss
        import faiss.contrib.torch_utils  # search takes tensors then
    except Exception as error:  # missing, or without its CUDA libraries
        print(f"Without FAISS: {error}")
        return {}
    if not hasattr(faiss, "StandardGpuResources"):
        print("Without FAISS: this is faiss-cpu.")
        return {}
    resources = faiss.StandardGpuResources()
    options = faiss.GpuIndexFlatConfig()
    options.device = keys.device.index or 0
    index = faiss.GpuIndexFlatL2(resources, keys.shape[1], options)
    index.add(keys)
    return {"FAISS GPU Flat": lambda: (index, resources)[0].search(queries, K)[1]}


def flashlib_knn(keys: Tensor, queries: Tensor) -> dict[str, Search]:
    if keys.device.type != "cuda":
        return {}
    try:
        from flashlib import flash_knn
    except Exception as error:
        print(f"Without flashlib: {error}")
        return {}
    half_keys, half_queries = keys.bfloat16(), queries.bfloat16()
    return {
        "flashlib, bfloat16": lambda: flash_knn(half_queries, half_keys, K)[1],
        "flashlib, float32": lambda: flash_knn(queries, keys, K)[1],
    }


def compare(clock: Clock, keys: Tensor, queries: Tensor, name: str) -> list[list[str]]:
    """A row for each search, and one for each kind of product that a search cannot do without."""
    memory = memory_of(keys)
    right, rows = nearest_in_float64(keys, queries[:COMPARED]), []
    title, ours = f"{name}{len(queries):,} x {len(keys):,} x {keys.shape[1]}", 0.0
    for label, search in searches(keys, queries, memory).items():
        try:
            agrees, taken, peak = share_that_agrees(search(), right), clock.milliseconds(search), clock.peak(search)
        except (RuntimeError, AssertionError) as error:  # out of memory, or a kernel that is not for this card
            rows.append([title, label, "-", "-", type(error).__name__, "-"])
            continue
        ours = taken if label == "ours" else ours
        rows.append([title, label, f"{taken:.3g}", f"{taken / ours:.2f}", agrees, peak])
    half = [tensor.half() for tensor in (keys, queries)]
    kinds = {
        "float32": lambda: products(keys, queries),
        "TF32": with_tf32(lambda: products(keys, queries)),
        "float16": lambda: products(*half),
    }
    for label, run in kinds.items():
        taken = clock.milliseconds(run)
        rows.append([title, f"the product alone, {label}, written", f"{taken:.3g}", f"{taken / ours:.2f}", "-", "-"])
    return rows


def whole_memory(clock: Clock, size: tuple[int, int, int], classes: int, values: str) -> list[list[str]]:
    """Search, sums and predictions of a memory with so many classes."""
    num_queries, num_keys, width = size
    memory = LocalMemory(params=ResMemParams(k=K, sigma=1.0), index="exact", values=values).to(clock.device)
    memory.reserve(num_keys)
    for start in range(0, num_keys, 8192):
        rows = min(8192, num_keys - start)
        outputs, labels = normal(clock, rows, classes), torch.randint(0, classes, (rows,), device=clock.device)
        memory.add(normal(clock, rows, width), outputs, labels)
    memory.build()
    queries, outputs = normal(clock, num_queries, width), normal(clock, num_queries, classes)
    kind = f"C = {classes:,}, {values}, {memory.stats()['bytes'] / 2**30:.2f} GiB"
    title = f"{num_queries:,} x {num_keys:,} x {width}, {kind}"
    runs = {
        "search": lambda: memory.search(queries, K),
        "memory(queries)": lambda: memory(queries, outputs),
        "predict": lambda: memory.predict(queries, outputs),
    }
    return [[title, name, f"{clock.milliseconds(run):.3g}", clock.peak(run)] for name, run in runs.items()]


def grid(clock: Clock, sizes: tuple[tuple[int, ...], tuple[int, ...]]) -> list[list[str]]:
    """Milliseconds of ours and of `addmm` + `topk`, a row for each number of keys and a column for one of queries."""
    rows = []
    for num_keys in sizes[0]:
        keys = normal(clock, num_keys, 128)
        memory, row = memory_of(keys), [f"{num_keys:,}"]
        for num_queries in sizes[1]:
            queries = normal(clock, num_queries, 128)
            ask, addmm = partial(memory.search, queries, K), addmm_topk(keys, queries)
            ask()  # what is asked for again is recorded
            row.append(f"{clock.milliseconds(ask):.3g} / {clock.milliseconds(addmm):.3g}")
        rows.append(row)
    return rows


def card(clock: Clock, size: int) -> list[list[str]]:
    """What the card can do at all."""
    square = normal(clock, size, size)
    half, to = square.half(), torch.empty_like(square)
    runs = {
        "float32": lambda: square @ square,
        "TF32": with_tf32(lambda: square @ square),
        "float16": lambda: half @ half,
    }
    rows = [
        [f"{name} product, {size:,} cubed", f"{2 * size**3 / clock.milliseconds(run) / 1e9:,.3g} TFLOP/s"]
        for name, run in runs.items()
    ]
    moved = 2 * square.nbytes / clock.milliseconds(lambda: to.copy_(square)) / 1e6
    return [*rows, ["copy, bytes read and written", f"{moved:,.0f} GB/s"]]


def normal(clock: Clock, *shape: int) -> Tensor:
    return torch.randn(*shape, device=clock.device)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog="RESMEM_FEATURES names a file of real features.")
    parser.add_argument("--device", default="cuda", help="where to, such as cuda:1 or cpu")
    parser.add_argument("--grid", action="store_true", help="only ours and addmm + topk, from few to many keys")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU does in a second")
    parser.add_argument("--rounds", type=int, default=9, help="of which the median is shown")
    parser.add_argument("--out", type=Path, help="a Markdown file to write")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("There is no GPU that torch can use: `--device cpu --small` shows what would be measured.")
        return
    torch.manual_seed(0)
    clock = Clock(device, given.rounds)
    name = torch.cuda.get_device_name(device) if clock.is_gpu else "CPU"
    if given.grid:
        sizes = SMALL_GRID if given.small else GRID
        header = ["keys", *(f"{count:,} queries" for count in sizes[1])]
        tables = [(f"Ours / addmm + topk, k = {K}, width 128, ms, on {name}", header, grid(clock, sizes))]
    else:
        tables = compared(clock, name, small=given.small)
    for title, header, rows in tables:
        show(title, header, rows)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text("\n".join(f"{title}\n\n{markdown(header, rows)}" for title, header, rows in tables))


def compared(clock: Clock, name: str, *, small: bool) -> list[TableOf]:
    """What the card can do, searches, and whole memories."""
    with torch.no_grad():
        abilities = card(clock, 256 if small else 8192)
        found: list[list[str]] = []
        for num_queries, num_keys, width in SMALL_SIZES if small else SIZES:
            found += compare(clock, normal(clock, num_keys, width), normal(clock, num_queries, width), "")
        if not small:
            keys, queries, source = features()
            found += compare(clock, keys.to(clock.device), queries.to(clock.device), f"{source}, ")
        size, many = (SMALL_SIZES[0], 2_000) if small else (SIZES[0], 32_000)
        whole = [*whole_memory(clock, size, 100, "dense"), *whole_memory(clock, size, many, "sparse")]
    return [
        (f"What the card can do: {name}, torch {torch.__version__}", ["what", "rate"], abilities),
        (
            f"Search, k = {K}, on {name}",
            ["queries x keys x width", "search", "ms", "times ours", "same neighbours as float64", "peak MiB"],
            found,
        ),
        (f"The whole memory, k = {K}, on {name}", ["queries x rows x width", "call", "ms", "peak MiB"], whole),
    ]


if __name__ == "__main__":
    main()
