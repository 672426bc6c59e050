from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdserve.transfer.allocator import PAGE, Allocator, align

PAGES = 40


class Machine(RuleBasedStateMachine):
    """Against the plainest model there is: one flag per page."""

    def __init__(self):
        super().__init__()
        self.a = Allocator(PAGES * PAGE + 100)  # the odd end is not used
        self.pages = [False] * PAGES
        self.held = {}

    @rule(size=st.integers(1, 12 * PAGE), high=st.booleans())
    def allocate(self, size, high):
        n = align(size) // PAGE
        offset = self.a.allocate(size, high=high)
        fits = any(not any(self.pages[i : i + n]) for i in range(PAGES - n + 1))
        assert (offset is not None) == fits
        if offset is not None:
            assert offset % PAGE == 0
            first = offset // PAGE
            assert not any(self.pages[first : first + n])
            self.pages[first : first + n] = [True] * n
            self.held[offset] = n

    @rule(first=st.integers(0, PAGES), n=st.integers(1, 8))
    def claim(self, first, n):
        fits = first + n <= PAGES and not any(self.pages[first : first + n])
        assert self.a.claim(first * PAGE, n * PAGE) == fits
        if fits:
            self.pages[first : first + n] = [True] * n
            self.held[first * PAGE] = n

    @rule(data=st.data())
    def free(self, data):
        if self.held:
            offset = data.draw(st.sampled_from(sorted(self.held)))
            n = self.held.pop(offset)
            self.pages[offset // PAGE : offset // PAGE + n] = [False] * n
            self.a.free(offset)

    @invariant()
    def free_extents_are_the_free_pages_joined(self):
        assert self.a.used == sum(self.pages) * PAGE
        marked = list(self.pages)
        last = -1
        for start, end in self.a.extents():
            assert start > last  # by address, and never two that touch
            last = end
            assert not any(self.pages[start // PAGE : end // PAGE])
            marked[start // PAGE : end // PAGE] = [True] * ((end - start) // PAGE)
        assert all(marked)


TestAllocator = Machine.TestCase


@given(st.lists(st.tuples(st.integers(1, 5 * PAGE), st.booleans()), max_size=30))
def test_freeing_everything_gives_one_extent_back(asks):
    a = Allocator(100 * PAGE)
    got = [o for size, high in asks if (o := a.allocate(size, high=high)) is not None]
    for offset in got:
        a.free(offset)
    assert a.extents() == [(0, 100 * PAGE)]
    assert a.used == 0


def test_small_chunks_leave_no_holes_among_large_ones():
    a = Allocator(100 * PAGE)
    large = [a.allocate(10 * PAGE) for _ in range(4)]
    a.allocate(PAGE, high=True)
    assert large == [0, 10 * PAGE, 20 * PAGE, 30 * PAGE]
    assert a.extents() == [(40 * PAGE, 99 * PAGE)]
