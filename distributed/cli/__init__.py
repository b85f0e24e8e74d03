"""The commands, one small module a verb: parse, call, print."""
