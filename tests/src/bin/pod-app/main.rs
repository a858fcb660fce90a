//! `pod-app`: the traffic program that runs in the pods of tests and of the demo. Servers say who they are and whom
//! they see; clients verify every exchange and print one line of JSON.
//!
//! It knows nothing of the mesh. Threads and blocking sockets on purpose: what an ordinary application does.

mod bulk;
mod client;
mod crowd;
mod options;
mod resolve;
mod server;

use anyhow::Result;
use clap::Parser;
use options::{Command, Options};

fn main() -> Result<()> {
    let report = match Options::parse().command {
        Command::Serve(args) => return server::serve(&args),
        Command::ServeMany { port } => return crowd::serve_many(port),
        Command::Crowd(args) => return crowd::crowd(&args),
        Command::Idle => loop {
            std::thread::park();
        },
        Command::Connects(args) => serde_json::to_string(&client::connects(&args)?)?,
        Command::Udp(args) => serde_json::to_string(&client::udp(&args)?)?,
        Command::Bulk(args) => serde_json::to_string(&bulk::client(&args)?)?,
        Command::Dial(args) => client::dial(&args)?,
        Command::Resolve(args) => serde_json::to_string(&resolve::resolve(&args)?)?,
        Command::Exchange(args) => serde_json::to_string(&resolve::exchange(&args)?)?,
        Command::Hold(args) => serde_json::to_string(&client::hold(&args)?)?,
    };
    println!("{report}");
    Ok(())
}
