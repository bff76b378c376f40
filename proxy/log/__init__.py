"""The decision log: records to lines, lines to a target that several processes share."""
