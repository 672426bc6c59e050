"""`pdserve doctor`: what this machine, a topology and a running deployment lack, each with the fix.

    subject    what is examined: the machine, a topology's plan, a deployment that runs
    registry   the list of checks; each is a function Subject -> findings, with a deadline
    runner     runs them side by side; one that hangs is given up, never waited for
    report     for people and for programs

A check's module looks at the machine in one function and judges in another, pure one; tests judge made-up facts.
"""
