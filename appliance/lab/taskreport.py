def page(found, laps):
    return ""
