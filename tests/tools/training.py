"""stub until merged"""


def measure(root, scratch, rounds):
    return []


def table(rows):
    return ""
