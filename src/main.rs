//! The `tale` command.

fn main() {}
