//! The command line of `pod-app`.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::net::SocketAddr;

/// Traffic for tests of a service mesh.
#[derive(Debug, Parser)]
pub(crate) struct Options {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve on the given ports until ended.
    Serve(Serve),
    /// Echo on a port, for very many connections, until ended.
    ServeMany {
        /// The port.
        #[arg(long)]
        port: u16,
    },
    /// Open many connections and keep them until ended.
    Crowd(Crowd),
    /// Do nothing until ended (a pod that only dials).
    Idle,
    /// Open many connections to a `who` server and verify each.
    Connects(Connects),
    /// Exchange many datagrams with a UDP server and verify each.
    Udp(Udp),
    /// Stream patterned bytes both ways at once over one connection and verify them.
    Bulk(Bulk),
    /// Open one connection, send one line or nothing, print what comes back.
    Dial(Dial),
    /// Look a name up with the C library's resolver, under a resolv.conf of one's own.
    Resolve(Resolve),
    /// Send DNS messages as they are given and print what comes back.
    Exchange(Exchange),
    /// Keep one connection to an `echo` server (UDP: to a `who` server) busy for as long as a file exists, and verify each line.
    Hold(Hold),
}

#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// The name that answers carry.
    #[arg(long)]
    pub(crate) name: String,
    /// Ports that answer each line with who it is and whom it sees.
    #[arg(long)]
    pub(crate) who: Vec<u16>,
    /// Ports that send every byte back.
    #[arg(long)]
    pub(crate) echo: Vec<u16>,
    /// Ports for `bulk` clients.
    #[arg(long)]
    pub(crate) bulk: Vec<u16>,
    /// Ports that accept and never read.
    #[arg(long)]
    pub(crate) sleep: Vec<u16>,
    /// Ports that send a banner before anything is read, then answer as `who`.
    #[arg(long)]
    pub(crate) banner: Vec<u16>,
    /// Ports that read a line, then reset the connection.
    #[arg(long)]
    pub(crate) reset: Vec<u16>,
    /// UDP ports that answer each datagram with who it is and whom it sees.
    #[arg(long)]
    pub(crate) udp: Vec<u16>,
}

#[derive(Debug, Args)]
pub(crate) struct Connects {
    /// The address to dial.
    #[arg(long)]
    pub(crate) to: SocketAddr,
    /// How many connections.
    #[arg(long, default_value_t = 1)]
    pub(crate) n: u64,
    /// On how many threads.
    #[arg(long, default_value_t = 1)]
    pub(crate) threads: u64,
    /// How to open each connection.
    #[arg(long, value_enum, default_value_t = Mode::Plain)]
    pub(crate) mode: Mode,
    /// Dial an IPv4 address from an IPv6 socket as `::ffff:a.b.c.d`.
    #[arg(long)]
    pub(crate) mapped: bool,
    /// Names of servers that may answer; any if none is given.
    #[arg(long)]
    pub(crate) expect: Vec<String>,
    /// Do not compare the client address that the server saw (a plain proxy is in the way on purpose).
    #[arg(long)]
    pub(crate) any_client: bool,
    /// Seconds until an exchange counts as lost.
    #[arg(long, default_value_t = 10)]
    pub(crate) timeout: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// Blocking connect.
    Plain,
    /// Non-blocking connect and poll.
    Nonblock,
    /// TCP Fast Open by `sendto(MSG_FASTOPEN)`.
    Tfo,
    /// TCP Fast Open by the socket option `TCP_FASTOPEN_CONNECT`.
    TfoConnect,
}

#[derive(Debug, Args)]
pub(crate) struct Crowd {
    /// The address to dial; an answer to one line is awaited.
    #[arg(long)]
    pub(crate) to: SocketAddr,
    /// How many connections.
    #[arg(long)]
    pub(crate) n: u64,
    /// On how many threads they are opened.
    #[arg(long, default_value_t = 8)]
    pub(crate) threads: u64,
    /// Do not wait for an answer but write until nothing more is taken.
    #[arg(long)]
    pub(crate) fill: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Udp {
    /// The address to send to.
    #[arg(long)]
    pub(crate) to: SocketAddr,
    /// How many datagrams.
    #[arg(long, default_value_t = 1)]
    pub(crate) n: u64,
    /// On how many threads.
    #[arg(long, default_value_t = 1)]
    pub(crate) threads: u64,
    /// `connect()` the socket first; otherwise `sendto`.
    #[arg(long)]
    pub(crate) connected: bool,
    /// A new socket for every datagram.
    #[arg(long)]
    pub(crate) fresh: bool,
    /// Send to an IPv4 address from an IPv6 socket.
    #[arg(long)]
    pub(crate) mapped: bool,
    /// Names of servers that may answer; any if none is given.
    #[arg(long)]
    pub(crate) expect: Vec<String>,
    /// Seconds until a datagram counts as lost.
    #[arg(long, default_value_t = 5)]
    pub(crate) timeout: u64,
}

#[derive(Debug, Args)]
pub(crate) struct Bulk {
    /// The address to dial.
    #[arg(long)]
    pub(crate) to: SocketAddr,
    /// Bytes from client to server.
    #[arg(long, default_value_t = 0)]
    pub(crate) up: u64,
    /// Bytes from server to client.
    #[arg(long, default_value_t = 0)]
    pub(crate) down: u64,
    /// The client reads at most this many bytes per second; 0 = as fast as it can.
    #[arg(long, default_value_t = 0)]
    pub(crate) read_rate: u64,
}

#[derive(Debug, Args)]
pub(crate) struct Resolve {
    /// Nameservers, in order.
    #[arg(long, required = true)]
    pub(crate) nameserver: Vec<std::net::IpAddr>,
    /// Search domains, in order.
    #[arg(long)]
    pub(crate) search: Vec<String>,
    /// Names with fewer dots are looked up in the search domains first.
    #[arg(long, default_value_t = 5)]
    pub(crate) ndots: u8,
    /// More options of resolv.conf.
    #[arg(long)]
    pub(crate) option: Vec<String>,
    /// The name.
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct Exchange {
    /// Where to send every message to.
    #[arg(long, required = true)]
    pub(crate) to: Vec<SocketAddr>,
    /// A message in hexadecimal.
    #[arg(long)]
    pub(crate) hex: Vec<String>,
    /// How many answers to wait for; as many as messages are sent if not given.
    #[arg(long)]
    pub(crate) answers: Option<usize>,
    /// Over one TCP connection.
    #[arg(long)]
    pub(crate) tcp: bool,
    /// `connect()` the UDP socket first.
    #[arg(long)]
    pub(crate) connected: bool,
    /// Send to an IPv4 address from an IPv6 socket.
    #[arg(long)]
    pub(crate) mapped: bool,
    /// Milliseconds to wait for each answer.
    #[arg(long, default_value_t = 8000)]
    pub(crate) timeout: u64,
}

#[derive(Debug, Args)]
pub(crate) struct Dial {
    /// The address to dial.
    #[arg(long)]
    pub(crate) to: SocketAddr,
    /// A line to send; nothing is sent without it.
    #[arg(long)]
    pub(crate) send: Option<String>,
    /// End the sending direction after the line (half-close).
    #[arg(long)]
    pub(crate) shutdown: bool,
    /// Send zeros until the peer's window and every buffer in between are full, at most this many bytes, and
    /// print how many were taken within `timeout`.
    #[arg(long)]
    pub(crate) fill: Option<u64>,
    /// Seconds to wait for data and for the end.
    #[arg(long, default_value_t = 5)]
    pub(crate) timeout: u64,
}

#[derive(Debug, Args)]
pub(crate) struct Hold {
    /// The address to dial.
    #[arg(long)]
    pub(crate) to: SocketAddr,
    /// A connected UDP socket in place of a TCP connection.
    #[arg(long)]
    pub(crate) udp: bool,
    /// The file.
    #[arg(long = "while")]
    pub(crate) file: std::path::PathBuf,
    /// Seconds to wait for each line.
    #[arg(long, default_value_t = 30)]
    pub(crate) timeout: u64,
}
