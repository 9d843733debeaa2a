"""Seeds that a GPU trains together, in waves of as many replicas as it holds at a time.

repro.py and modern.py say what is computed; this trains the same with kernels/stack1989.c, in which a replica
is a thread block. Digits, weights and gradients stay on the GPU: after each pass only the losses and misses
are copied to the CPU, and after the last pass the weights.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

import utils
from kernels import cuda, stack1989
from records import ranks
from records import run as runs

AT_A_TIME = stack1989.AT_A_TIME  # digits in a launch
KERNELS = ("train", "evaluate", "layout")
SHARED_BYTES = 57_344  # of a block, at most: four of these fit into an H100's multiprocessor
# Blocks that a multiprocessor has the memory for -> threads of a block: with more threads, the compiler would
# have to move registers to memory.
THREADS = {1: 384, 2: 256, 3: 192, 4: 192}


class Gpu:
    """One variant of the network, compiled and loaded for PyTorch's current GPU.

    `variant` has the arguments of Stack1989. The build is "ieee", which computes the bits of the C build, or
    "fast", which rounds as is fastest. `wave` is how many replicas the GPU holds at a time. Raises
    build.Unavailable where the network cannot be had.
    """

    def __init__(self, build="ieee", **variant):
        self.build, self.variant, self._loaded = build, variant, {}
        self.device = cuda.Device()
        launcher = self._stack([0]).launcher
        self.wave = launcher.resident_blocks("train")
        floats = launcher.constant("net_floats") + launcher.constant("extra_floats")
        # and copies of the parameters and the rates, and the outputs for a launch, twice
        self.replica_bytes = 4 * (floats + 3 * stack1989.PARAMETERS + 2 * 10 * AT_A_TIME)

    def facts(self):
        """What run.json says of the engine."""
        return {"engine": "cuda", "device": "cuda", "build": self.build, "wave": self.wave}

    def _stack(self, seeds):
        place = self.device.place()
        return stack1989.Stack1989(seeds, **self.variant, device=place, make_launcher=self._load)

    def _load(self, defines):
        """The kernels of a variant; each is loaded once."""
        key = tuple(defines.items())
        if key not in self._loaded:
            fit = self.device.shared_bytes_in_all // (SHARED_BYTES + 1024)  # the driver takes 1 KB a block
            blocks = max(1, min(fit, max(THREADS)))
            defines = defines | {"THREADS": THREADS[blocks], "BLOCKS": blocks}
            flags = cuda.FAST if self.build == "fast" else cuda.IEEE
            given = self.device, stack1989.SOURCE, KERNELS, defines, flags, THREADS[blocks]
            self._loaded[key] = cuda.Kernels(*given)
        return self._loaded[key]

    def start(self, seeds, parameters):
        """The Replicas of these seeds, each of which starts from its own of the `parameters`."""
        return Replicas(self._stack(seeds), parameters)

    def compute_outputs(self, parameters, images):
        """The outputs (n, 10) of one network for images (n, 1, 20, 20), all of them arrays."""
        return self.start([0], [parameters]).compute_outputs(images)[0]

    def train(self, seeds, parameters, splits, targets, passes, rates, progress=lambda n: None, lower="--lr"):
        """Train a replica for each seed; return seed -> its records, two for each pass, and the Replicas.

        `parameters`: of each seed, to start from; `splits`: train and test, each images (n, 1, 20, 20) and
        labels (n,); `targets`: split -> (n, 10). `rates(number, replicas, images)` is the learning rate of a
        pass, as Stack1989 takes it. `progress(n)` is called after every n presentations. RunFailed where a
        replica diverges, `lower` being the flag to lower then, or where the GPU has too little memory.
        """
        arrays = {split: (images, targets[split]) for split, (images, _) in splits.items()}
        free, _ = torch.cuda.mem_get_info(self.device.index)
        try:
            replicas, records = self.start(seeds, parameters), {seed: [] for seed in seeds}
            digits = {split: tuple(map(replicas.tensor, own)) for split, own in arrays.items()}
            for number in range(1, passes + 1):
                lr = rates(number, replicas, digits["train"][0])
                for images, answers in zip(*(tensor.split(AT_A_TIME) for tensor in digits["train"])):
                    try:
                        replicas.stack.train_pass(images, answers, lr)
                    except FloatingPointError as error:
                        raise utils.RunFailed(f"pass {number}: {error}; lower {lower}") from error
                    progress(len(seeds) * len(images))
                for split, (images, answers) in digits.items():
                    for seed, loss, misses in zip(seeds, *replicas.evaluate(images, answers)):
                        records[seed].append(runs.evaluation(number, split, loss, misses, len(images)))
            return records, replicas
        except cuda.Failed as error:
            raise utils.RunFailed(f"{error}: seeds that had finished are kept") from error
        except torch.OutOfMemoryError as error:
            taken = sum(array.nbytes for own in arrays.values() for array in own)
            fit = max(0, (free - taken) // self.replica_bytes)
            text = f"{len(seeds)} replicas do not fit into the memory of the GPU: about {fit} would"
            raise utils.RunFailed(f"{text}; lower --seeds, or end what else runs there") from error


class Replicas:
    """The replicas of a wave: arrays go in and come out, but for `evaluate`, which takes tensors."""

    def __init__(self, stack, parameters):
        self.stack, self._kind = stack, type(parameters[0])
        stack.set_parameters(self.tensor(stack1989.pack(map(np.stack, zip(*parameters)))))

    def tensor(self, array):
        """The array on the GPU."""
        return torch.as_tensor(array).to(self.stack.net.device)

    def evaluate(self, images, targets):
        """Each replica's mean loss over the tensors images (n, 1, 20, 20), targets (n, 10); its misses."""
        losses, misses = self.stack.evaluate(images, targets)
        return (losses / len(images)).tolist(), misses.tolist()

    def compute_outputs(self, images):
        """The outputs (replicas, n, 10) for an array of images (n, 1, 20, 20)."""
        parts = self.tensor(images).split(AT_A_TIME)
        return np.concatenate([self.stack.outputs(part).cpu().numpy() for part in parts], axis=1)

    def parameters(self):
        """The parameters of each replica, as it was given them: named tuples of arrays."""
        arrays = [array.numpy() for array in stack1989.unpack(self.stack.parameters().cpu())]
        return [self._kind(*own) for own in zip(*arrays)]


def train_waves(run, seeds, wave, train, save, threads, total, quiet):
    """Train all seeds, a wave at a time, and write each wave as soon as it is done: a list.

    `train(seeds, progress=...)` returns seed -> records, the Replicas, and any lists of one entry for each
    seed. `save(seed, parameters, ...)`, with these entries, is called for each seed, `threads` at a time.
    `total` is the number of presentations, for the progress bar. The list has the Replicas of the first wave,
    which figures show, and None for each other.
    """

    def job(own, progress):
        started = time.perf_counter()
        records, replicas, *more = train(own, progress=progress)
        seconds = time.perf_counter() - started
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(save, own, replicas.parameters(), *more))
        run.add(records, seconds)
        return replicas if own[0] == seeds[0] else None  # the others' memory is free again

    return runs.in_parallel(job, ranks.cut(seeds, ranks.agree(wave)), 1, total, quiet)
