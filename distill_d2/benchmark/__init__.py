"""What distillation costs: the modules behind ``distill-d2 benchmark``.

measure   the order of the work
inputs    generated images with objects
subjects  student, teachers, losses and training steps
rows      what each round measures
parts     parts of losses that are measured alone
naive     plain formulas that a loss is compared with
meter     time and memory
report    ratios and tables
"""
