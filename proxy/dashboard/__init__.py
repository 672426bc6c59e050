"""The operator's page: what runs, how fast, what the cache saves, and what went wrong, live in a browser.

page.py       serves the files under static/
collector.py  looks at engines, cache daemons and the proxy itself, every second while somebody watches
board.py      keeps what was seen: the latest picture, and an hour of samples; shared by the workers of one proxy
feed.py       gives it out: /admin/overview, and /admin/events as server-sent events
"""
