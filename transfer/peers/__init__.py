"""The cache daemons of other hosts: who they are, what they hold, and how chunks come from there and go there.

sources      who should be there: a list, DNS, etcd
membership   who is: greeted, draining, gone, left alone after a failure
directory    which peer holds which chunk, kept from numbered events
pull         what to ask of whom, and whether it is worth it (pure); fetching does it
push, rising what to send to whom: as it commits, or when it has come up from disk (pure); giving does it
inbox        what arrives: slots, digests, publication
link         one peer as it is spoken to
node         all of it together inside the daemon
"""
