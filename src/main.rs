//! The `tale` command.

fn main() -> std::process::ExitCode {
    tale_models::device::share_one_heap();
    tale::cli::run()
}
