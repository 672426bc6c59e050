"""A second CUDA context beside torch's own, on a real device."""

import torch

from pdserve.kernels.second_context import SecondContext


def free() -> int:
    return torch.cuda.mem_get_info(0)[0]


def test_torch_computes_on_and_the_memory_comes_back():
    a = torch.randn(512, 512, device="cuda")
    want = (a @ a).cpu()
    before = free()
    context = SecondContext(0)
    taken = before - free()
    assert taken > 0
    for _ in range(5):
        context.touch()
        assert torch.equal((a @ a).cpu(), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = a @ a
    context.touch()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out.cpu(), want)
    held = free()
    context.close()
    assert free() - held >= taken * 0.9, "what it took comes back"
    assert torch.equal((a @ a).cpu(), want)
