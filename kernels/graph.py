"""CUDA graphs: what a step launches is recorded once, and from then on started as a whole."""

import torch


class Recorded:
    """`step(*arguments)` with its kernels recorded in a CUDA graph, one for each `arguments`.

    A step takes its inputs from tensors and changes tensors in place: those in `state`, and no others, since
    the steps that warm CUDA up before a recording are undone. Arguments are numbers, and decide the shapes.
    """

    def __init__(self, step, state):
        self.step, self.state, self.graphs = step, state, {}

    def __call__(self, *arguments):
        if arguments not in self.graphs:
            self.graphs[arguments] = self._record(arguments)
        self.graphs[arguments].replay()

    def _record(self, arguments):
        before = [tensor.clone() for tensor in self.state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # as PyTorch's notes on CUDA graphs advise
                self.step(*arguments)
                for tensor, value in zip(self.state, before):
                    tensor.copy_(value)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(*arguments)
        return graph
