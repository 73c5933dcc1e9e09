"""An attention call carried out on numbers: the program of the engine, in integers."""
