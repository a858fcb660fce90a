//! The `mesh-cni` command: the CNI plugin of nodemesh. See [`mesh_node::cni`].

use mesh_node::cni::{Outcome, run};
use std::{
    env,
    io::{self, Write},
    process::ExitCode,
};

fn main() -> ExitCode {
    let get = |name: &str| env::var_os(name).and_then(|value| value.into_string().ok());
    let (output, code) = match run(&get, &mut io::stdin().lock()) {
        Outcome::Done(output) => (output, ExitCode::SUCCESS),
        Outcome::Unfinished(why) => {
            eprintln!("{why}");
            (None, ExitCode::SUCCESS)
        }
        Outcome::Failed(error) => (Some(error), ExitCode::FAILURE),
    };
    match output.map(|json| writeln!(io::stdout(), "{json}")) {
        // A runtime that does not read the answer must not take the run for a success.
        Some(Err(_)) => ExitCode::FAILURE,
        _ => code,
    }
}
