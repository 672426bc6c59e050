"""`pdserve bench regimes`: a sweep in which each fixed strategy is the best one somewhere, and the adaptive one is held against it.

grid    the points and what is sent at each; pure
judge   who is best at each point, and whether the adaptive arm is within noise of it; pure
cli     starts the arms in turns, sends every point to each, reads what the engines decided
"""
