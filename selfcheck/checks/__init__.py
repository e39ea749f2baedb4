"""One module a family of claims; every check is `check(context) -> Result` and measures something."""
