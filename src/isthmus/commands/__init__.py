"""The commands of the `isthmus` program, one file per group."""
