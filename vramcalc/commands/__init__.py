"""One module a command, each a function of the same name: parse, call one function, render."""
