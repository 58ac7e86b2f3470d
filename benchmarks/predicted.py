"""What the CUDA kernels should take on a GPU that nobody has at hand: from bytes, operations and counted instructions.

    python benchmarks/predicted.py linear            # 1 to 512 rows of a 4096 x 4096 layer (--outputs, --inputs)
    python benchmarks/predicted.py resnet50          # each convolution at 1, 8 and 64 images; or mobilenet_v2
    python benchmarks/predicted.py mixed             # 64 rows of 16 tasks, of which some are open (--rows, --tasks)
    python benchmarks/predicted.py depthwise         # the depthwise ones of mobilenet_v2 (--model), and their gradients

Predicted, all of it: nothing here was measured on a GPU. The device is an H200: 132 multiprocessors at 1.98 GHz, 4.3
TB/s from memory, 5.5 TB/s from L2 to the multiprocessors, 550 TFLOP/s of stock bf16 products, 2.5 us a kernel.

A fused product takes the longest of: its bytes from memory; its tiles' bytes from L2; its instructions, which
tools/loop_table.py counts, at four a clock; the latency of its steps one after another, halved where two blocks share a
multiprocessor (assumed: 50 clocks for the barrier, 40 for what is loaded and added, seven for an mma of a quarter's two
warps). A split depth adds the sums of its parts: up to eight the blocks themselves, as a cluster; a second kernel those
of more, and on compute capability 8 all ("second kernel"). Which tiles a linear layer takes is what `plan` says; up to
four rows have none (csrc/cuda/rows.cuh), but their bytes from memory, those of x from L1 at 64 a clock, and the loop's
instructions. A rebuild moves W, Delta and W_t, then the stock product runs from W_t. A convolution is the product of
its pixels, with the loop of csrc/cuda/pixels.cuh, or under a kernel of one place that goes from pixel to pixel the
linear layer's; those whose channels make no pieces of 16 bytes are rebuilt in any case.

A mixed batch (csrc/cuda/mixed.cuh) is a kernel that puts samples in the order of their tasks, given as long as it takes
to look at each sample twice, one after the other, in six clocks; and one launch for the tiles of all tasks, each of 64
rows at most, which reads W from memory once, every open Delta once, and both from L2 for every tile. Beside it stand
the base alone; a rebuild and a stock product for each open task, samples gathered and scattered; and merged copies, one
after the other.

A depthwise convolution takes the longer of its bytes and its instructions, counted in the machine code for sm_90a of
the way inside an image. cuDNN's is given its bytes as well, or its multiplications alone at full rate: better than it
is known to be. Behind its weight gradient come three kernels, <G, Delta> in two and g * G; the fused one has two more.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

CLOCK, MULTIPROCESSORS = 1.98e9, 132
MEMORY, L2, STOCK = 4.3e12, 5.5e12, 550e12  # bytes, bytes and operations a second
LAUNCH, SECOND = 2.5e-6, 3e-6  # a kernel; the one that adds splits
# Splits that a cluster adds instead, up to so many: seconds of two waits for all of its blocks, and the sums' bytes a
# second between multiprocessors; both assumed.
MOST_OF_CLUSTER, WAITS, BETWEEN = 8, 0.5e-6, 3.3e12
WARPS = 8  # of a block
# Rows up to which no tiles serve -> bytes of Delta -> instructions a warp and step, weights of a step.
WITHOUT_TILES = {1: {2: (127, 1024), 4: (123, 512)}, 4: {2: (288, 1024), 4: (216, 512)}}
ENDS = {1: 80, 4: 260}  # instructions of a warp besides: where it begins, shuffles and the sum
L1 = 64 * CLOCK * MULTIPROCESSORS  # bytes a second
FEW = 16


@dataclass(frozen=True)
class Tile:
    """Sizes of a tile and of a step; bytes of a number of Delta -> instructions a warp and step; clocks of a step."""

    rows: int
    columns: int
    depth: int
    instructions: dict[int, int]
    latency: int


FEW_ROWS = Tile(FEW, 32, 64, {2: 69, 4: 88}, 230)
MORE_ROWS = Tile(64, 64, 32, {2: 71, 4: 117}, 300)
# Bytes of a number of Delta -> the tiles of wide layers.
WIDE = {
    2: (Tile(64, 128, 32, {2: 92}, 320), Tile(128, 128, 32, {2: 123}, 540)),
    4: (Tile(64, 128, 16, {4: 95}, 200), Tile(128, 128, 16, {4: 103}, 320)),
}
PIXELS = {16: {2: 83, 4: 108}, 64: {2: 92, 4: 141}}  # instructions where the rows are pixels under several places
MOST_PIXELS, MOST_INPUTS = 256, 512  # that choose() fuses of a convolution (csrc/core/choose.h, "shallow")


@dataclass(frozen=True)
class Product:
    """A gated layer as a product: rows, outputs, inputs, bytes of a number of Delta (W and x are bf16).

    `read` is how many numbers its input has, where the product's rows share them. `pixels`: a convolution that is no
    linear layer; `fits`: the kernels know it.
    """

    name: str
    rows: int
    outputs: int
    inputs: int
    delta: int = 2
    read: int | None = None
    pixels: bool = False
    fits: bool = True

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs

    @property
    def operations(self) -> float:
        return 2.0 * self.rows * self.weights

    @property
    def activations(self) -> int:
        read = self.rows * self.inputs if self.read is None else self.read
        return 2 * (read + self.rows * self.outputs)


@dataclass(frozen=True)
class Grid:
    """How `plan` (csrc/cuda/linear.cuh) lays a product out, and what it says that costs."""

    tile: Tile
    tiles: int
    steps: int
    splits: int
    cost: float
    clusters: bool

    def bytes_of(self, p: Product) -> float:
        """From L2."""
        stage = self.tile.depth * (2 * self.tile.rows + self.tile.columns * (2 + p.delta))
        return self.tiles * self.steps * stage


def laid_out(p: Product, tile: Tile, clusters: bool = True) -> Grid:
    tiles, steps = -(-p.rows // tile.rows) * -(-p.outputs // tile.columns), -(-p.inputs // tile.depth)
    grid = Grid(tile, tiles, steps, 1, math.inf, clusters)
    weight_bytes, best = p.weights * (2 + p.delta), math.inf
    moved = max(weight_bytes, 0.8 * grid.bytes_of(p))
    for splits in range(1, 17):
        if steps < 4 * splits and splits > 1:
            break
        waves = -(-tiles * splits // MULTIPROCESSORS)
        busy = tiles * splits / (waves * MULTIPROCESSORS)
        sums = float(splits * p.rows * p.outputs)
        together = clusters and splits <= MOST_OF_CLUSTER
        partial = 0.0 if splits == 1 else 2e6 + 4.0 * sums if together else 1e7 + 8.0 * sums
        if weight_bytes / busy + partial < best:
            best = weight_bytes / busy + partial
            grid = Grid(tile, tiles, steps, splits, moved / busy + partial, clusters)
    return grid


def planned(p: Product, clusters: bool = True) -> Grid:
    """A convolution under several places has no wide tiles."""
    if p.rows <= FEW:
        return laid_out(p, FEW_ROWS, clusters)
    tiles = (MORE_ROWS,) if p.pixels else (MORE_ROWS, *WIDE[p.delta])
    return min((laid_out(p, tile, clusters) for tile in tiles), key=lambda grid: grid.cost)


def without_tiles(p: Product) -> float:
    """Seconds of the product of up to four rows without tensor cores, as `plan_rows` lays it out."""
    rows = 1 if p.rows == 1 else 4
    instructions, weights = WITHOUT_TILES[rows][p.delta]
    slices = 1
    while slices < WARPS and p.inputs >= 1024 * slices and -(-p.outputs * slices // 16) < 2 * MULTIPROCESSORS:
        slices *= 2
    blocks = -(-p.outputs * slices // 16)
    busiest = -(-blocks // MULTIPROCESSORS) * MULTIPROCESSORS / blocks  # a multiprocessor's share over the mean
    issued = p.weights / weights * instructions + blocks * WARPS * ENDS[rows]
    loaded = p.weights * (2 + p.delta) + rows * p.weights  # two outputs share a row of x in 16 bits
    moved = p.weights * (2 + p.delta) + p.activations
    clocks = issued / MULTIPROCESSORS / 4 * busiest
    return max(moved / MEMORY, loaded / L1 * busiest, clocks / CLOCK) + LAUNCH


def fused(p: Product, clusters: bool = True) -> float:
    """Seconds of the fused product; without clusters a second kernel adds all splits."""
    return without_tiles(p) if p.rows <= 4 and not p.pixels else in_tiles(p, planned(p, clusters))


def in_tiles(p: Product, grid: Grid | None = None) -> float:
    """Seconds of the fused product on tensor cores, as it is planned or with another grid."""
    grid = grid or planned(p)
    tile, splits = grid.tile, grid.splits
    instructions = PIXELS[tile.rows] if p.pixels else tile.instructions
    blocks, each = grid.tiles * splits, -(-grid.steps // splits)
    waves = -(-blocks // MULTIPROCESSORS)
    clocks = max(each * waves * WARPS * instructions[p.delta] / 4, each * tile.latency * waves / min(2, waves))
    moved = p.weights * (2 + p.delta) + p.activations
    seconds = max(moved / MEMORY, grid.bytes_of(p) * each * splits / grid.steps / L2, clocks / CLOCK) + LAUNCH
    sums = float(splits * p.rows * p.outputs)
    together = grid.clusters and splits <= MOST_OF_CLUSTER
    return seconds + (0.0 if splits == 1 else WAITS + 4.0 * sums / BETWEEN if together else SECOND + 8.0 * sums / L2)


MIXED = Tile(64, 64, 32, {2: 68, 4: 110}, 300)
MIXED_CLOSED = 52  # instructions of a step where a tile is the base's


def order(samples: int) -> float:
    """Seconds of the kernel that puts samples in order."""
    return LAUNCH + 2 * 6 * samples / CLOCK


def mixed(p: Product, tasks: int, opened: float) -> float:
    """Seconds of a mixed batch of `tasks` with as many rows each, of which so many are open; a sample to a row."""
    each = p.rows / tasks
    open_tiles = opened * math.ceil(each / MIXED.rows)
    closed_tiles = math.ceil((tasks - opened) * each / MIXED.rows)
    across, steps = -(-p.outputs // MIXED.columns), -(-p.inputs // MIXED.depth)
    blocks = (open_tiles + closed_tiles) * across
    from_memory = p.weights * 2 + opened * p.weights * p.delta + p.activations
    x = 2 * p.rows * p.inputs * across  # rows that a tile has not are not read
    from_l2 = (open_tiles + closed_tiles) * p.weights * 2 + open_tiles * p.weights * p.delta + x
    issued = (open_tiles * MIXED.instructions[p.delta] + closed_tiles * MIXED_CLOSED) * across * steps * WARPS
    waves = math.ceil(blocks / MULTIPROCESSORS)
    latency = steps * MIXED.latency * waves / min(2, waves) / CLOCK
    seconds = max(from_memory / MEMORY, from_l2 / L2, issued / 4 / MULTIPROCESSORS / CLOCK, latency)
    return seconds + LAUNCH + order(p.rows)


def print_mixed(outputs: int, inputs: int, rows: int, tasks: int) -> None:
    print(f"{outputs} x {inputs}, {rows} rows of {tasks} tasks; in brackets the base's over the grouped time\n")
    print("| open | Delta | base | grouped | rebuilt task by task | merged copies |\n|---|---|---|---|---|---|")
    for share in (0.25, 0.6, 1.0):
        for delta in (2, 4):
            p, opened = Product("", rows, outputs, inputs, delta), share * tasks
            one = Product("", max(1, rows // tasks), outputs, inputs, delta)
            base, ours = stock(p, 2 * p.weights), mixed(p, tasks, opened)
            moved = 2 * (LAUNCH + 2 * p.activations / 2 / MEMORY)  # gathered, scattered
            others = opened * rebuilt(one) + (base if share < 1 else 0.0) + moved
            copies = tasks * stock(one, 2 * p.weights)
            cells = (
                f"{1e6 * base:.1f} | {1e6 * ours:.1f} ({base / ours:.2f}x) | {1e6 * others:.0f} | {1e6 * copies:.0f}"
            )
            print(f"| {share:.0%} | {'bf16' if delta == 2 else 'fp32'} | {cells} |")


def stock(p: Product, weight_bytes: float) -> float:
    """Seconds of torch's product with a weight of so many bytes that are still to come from memory."""
    return max((weight_bytes + p.activations) / MEMORY, p.operations / STOCK) + LAUNCH


def rebuilt(p: Product) -> float:
    """Seconds of a rebuild and the stock product; of W_t what fits is still in L2 (50 MB)."""
    written = 2 * p.weights
    return (p.weights * (2 + p.delta) + written) / MEMORY + LAUNCH + stock(p, max(0, written - 50e6))


def chosen(p: Product) -> float:
    """Seconds of the path that choose() takes for a convolution."""
    return fused(p) if p.fits and p.rows <= MOST_PIXELS and p.inputs <= MOST_INPUTS else rebuilt(p)


def better(p: Product) -> float:
    """Seconds of the path that should be the faster one."""
    return min(fused(p), rebuilt(p)) if p.fits else rebuilt(p)


# Kernel, stride -> instructions of a warp for a pixel of its 32 vectors of 8 channels: forward and weight gradient, of
# the result; input gradient, of the input.
DEPTHWISE = {
    (3, 1): (236, 242, 255),
    (3, 2): (289, 102, 300),
    (5, 1): (518, 532, 560),
    (5, 2): (760, 187, 634),
    (7, 1): (1040, 1072, 1264),
}


@dataclass(frozen=True)
class Depthwise:
    """A depthwise convolution in bf16: channels, kernel, stride, pixels of its input and of its result."""

    name: str
    channels: int
    kernel: int
    stride: int
    inputs: int
    results: int

    @property
    def bytes(self) -> float:
        return 2.0 * self.channels * (self.inputs + self.results)

    def fused(self, product: int) -> float:
        """Seconds of a product, 0 to 2 as DEPTHWISE lists them."""
        pixels = self.inputs if product == 1 else self.results
        instructions = pixels * -(-self.channels // 8) / 32 * DEPTHWISE[self.kernel, self.stride][product]
        seconds = max(self.bytes / MEMORY, instructions / (4 * MULTIPROCESSORS * CLOCK)) + LAUNCH
        return seconds + (SECOND + LAUNCH if product == 2 else 0.0)

    def stock(self) -> float:
        """Seconds of any of them by cuDNN, at best."""
        products = self.results * self.channels * self.kernel**2
        return max(self.bytes / MEMORY, products / (128 * MULTIPROCESSORS * CLOCK)) + LAUNCH

    def rebuilt(self, product: int) -> float:
        """Seconds with a rebuild before it, or with <G, Delta> behind it; weights are small beside a launch."""
        return self.stock() + (3 * LAUNCH if product == 2 else LAUNCH)


def depthwise(model: str, images: int) -> list[Depthwise]:
    import torch
    import torchvision
    from torch import nn

    found: list[Depthwise] = []
    with torch.device("meta"):
        net = torchvision.models.get_model(model).eval()

        def note(name: str, module: nn.Conv2d) -> None:
            def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                pixels = (one.numel() // module.in_channels for one in (inputs[0], output))
                found.append(Depthwise(name, module.in_channels, module.kernel_size[0], module.stride[0], *pixels))

            module.register_forward_hook(hook)

        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels:
                note(name, module)
        net(torch.empty(images, 3, 224, 224))
    return found


def print_depthwise(model: str) -> None:
    print(f"| {model}, us | images | limit | fused | rebuilt layer by layer | at once |\n|---|---|---|---|---|---|")
    for images in (1, 8, 64):
        layers = depthwise(model, images)
        for product, name in enumerate(("forward", "input gradient", "weight gradient")):
            limit = sum(one.bytes / MEMORY for one in layers)
            ours, other = (sum(way(one, product) for one in layers) for way in (Depthwise.fused, Depthwise.rebuilt))
            # One rebuild for all layers, or three kernels for all their gradients.
            once = sum(one.stock() for one in layers) + (3 * LAUNCH if product == 2 else LAUNCH)
            cells = " | ".join(f"{1e6 * value:.0f}" for value in (limit, ours, other, once))
            print(f"| {name} | {images} | {cells} |")


def convolutions(model: str, images: int, delta: int) -> Iterator[Product]:
    """Each convolution as the product of its pixels; grouped ones have no such product."""
    import torch
    import torchvision
    from torch import nn

    with torch.device("meta"):
        net = torchvision.models.get_model(model)
        found: list[Product] = []

        def note(name: str, module: nn.Conv2d) -> None:
            def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                pixels = output.shape[0] * output.shape[2] * output.shape[3]
                depth = module.weight[0].numel()
                linear = depth == module.in_channels and module.stride == (1, 1) and module.padding == (0, 0)
                fits = module.in_channels % (2 if linear else 8) == 0
                read = inputs[0].numel()
                found.append(Product(name, pixels, module.out_channels, depth, delta, read, not linear, fits))

            module.register_forward_hook(hook)

        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d) and module.groups == 1:
                note(name, module)
        net.eval()(torch.empty(images, 3, 224, 224))
    yield from found


def row(p: Product, first: str) -> str:
    ours, tiles, other, merged = fused(p), in_tiles(p), rebuilt(p), stock(p, 2 * p.weights)
    second = fused(p, clusters=False)
    limit = (p.weights * (2 + p.delta) + p.activations) / MEMORY
    faster = "fused" if p.fits and ours <= other else "rebuild"
    cells = (f"{1e6 * value:.1f}" for value in (limit, ours, second, tiles, other, merged))
    return f"| {first} | {' | '.join(cells)} | {faster} |"


HEAD = (
    "| {} | limit | fused | second kernel | in tiles | rebuild | merged | faster |\n|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["linear", "mixed", "resnet50", "mobilenet_v2", "depthwise"])
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--delta", type=int, choices=[2, 4], default=2, help="bytes of a number of Delta")
    parser.add_argument("--rows", type=int, default=64, help="of mixed")
    parser.add_argument("--tasks", type=int, default=16, help="of mixed")
    parser.add_argument("--model", default="mobilenet_v2", help="of depthwise: of torchvision")
    args = parser.parse_args()
    print("predicted microseconds, not measured\n")
    if args.what == "depthwise":
        print_depthwise(args.model)
        return
    if args.what == "mixed":
        print_mixed(args.outputs, args.inputs, args.rows, args.tasks)
        return
    if args.what == "linear":
        print(HEAD.format("rows"))
        for rows in (1, 2, 3, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512):
            print(row(Product("", rows, args.outputs, args.inputs, args.delta), str(rows)))
        return
    for images in (1, 8, 64):
        print(HEAD.format(f"{args.what}, images: {images}"))
        products = list(convolutions(args.what, images, args.delta))
        for p in products:
            print(row(p, p.name))
        total = [1e6 * sum(map(of, products)) for of in (rebuilt, better, chosen)]
        print(f"\nall: rebuild {total[0]:.0f}, the better of each {total[1]:.0f}, as chosen {total[2]:.0f}\n")


if __name__ == "__main__":
    main()
