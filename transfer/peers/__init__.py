"""The cache daemons of other hosts: who they are, what they hold, and how chunks come from there and go there.

sources      who should be there: a list, DNS, etcd
membership   who is: greeted, draining, gone, left alone after a failure
directory    which peer holds which chunk, kept from numbered events
pull, push   what to ask of whom; what to send to whom (pure)
inbox        what arrives: slots, digests, publication
node         all of it together inside the daemon
"""
