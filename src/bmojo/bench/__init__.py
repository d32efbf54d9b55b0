"""How fast the ops and the models of the family are, beside other libraries' in the same run.

`cases` what is measured, `rivals` other libraries' forms of it, `contest` how it is timed, `floor` how fast it could
be, `stream` what a long stream does to the memory of the process, `job` the run and its record, `bars` what must
hold, `report` tables and figures.
"""
