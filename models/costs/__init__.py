"""What a network costs: its own forward as operations (`trace`, `aten_costs`,
`parameter_use`), counted (`complexity`, `accesses`, `dcn_traffic`), timed on this computer
(`run_profile`), and drawn (`plots`)."""
