"""Does GOAT deliver? The paper's comparison at a size that two CPU cores manage; see docs/quality.md."""
