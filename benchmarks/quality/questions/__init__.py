"""One question a module: `measure(study)` gives JSON values, `fields(result)` their text on the page."""
