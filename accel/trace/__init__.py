"""When each resource works: the time line of a report (`timeline`), as a trace that Perfetto
opens (`perfetto`), and pictures of reports (`plots`)."""
