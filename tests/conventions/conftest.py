from tests.conventions import measures


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("measures")
    for line in measures.summary():
        terminalreporter.write_line(line)
