"""The tests: a mirror of cml_runner/, and the far side in lab/."""
