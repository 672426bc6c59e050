"""`pdserve bench report DIR`: one HTML page of the results in a folder; plots inline, no scripts, nothing fetched."""
