//! DNS: the C library's resolver, and single messages as a test makes them.

use crate::{
    client::target,
    options::{Exchange, Resolve},
};
use anyhow::{Context, Result};
use mesh_tests::app::{Exchanged, Resolved, from_hex, to_hex};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs, UdpSocket},
    time::{Duration, Instant},
};

/// `getaddrinfo`, with /etc/resolv.conf replaced in a mount namespace of this process.
pub(crate) fn resolve(args: &Resolve) -> Result<Resolved> {
    let mut conf: String = args.nameserver.iter().map(|ip| format!("nameserver {ip}\n")).collect();
    if !args.search.is_empty() {
        conf += &format!("search {}\n", args.search.join(" "));
    }
    conf += &format!("options ndots:{} {}\n", args.ndots, args.option.join(" "));
    let none: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS).context("unshare")?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("private mounts")?;
    mount(Some("tmpfs"), "/mnt", Some("tmpfs"), MsFlags::empty(), none).context("tmpfs on /mnt")?;
    std::fs::write("/mnt/resolv.conf", conf)?;
    mount(Some("/mnt/resolv.conf"), "/etc/resolv.conf", none, MsFlags::MS_BIND, none)
        .context("mount over /etc/resolv.conf")?;
    let started = Instant::now();
    let found = (args.name.as_str(), 0).to_socket_addrs();
    let millis = started.elapsed().as_millis() as u64;
    Ok(match found {
        Ok(all) => {
            let addresses: BTreeSet<String> = all.map(|addr| addr.ip().to_string()).collect();
            Resolved { addresses: addresses.into_iter().collect(), error: String::new(), millis }
        }
        Err(error) => Resolved { addresses: vec![], error: error.to_string(), millis },
    })
}

pub(crate) fn exchange(args: &Exchange) -> Result<Exchanged> {
    let messages: Vec<Vec<u8>> = args
        .hex
        .iter()
        .map(|hex| from_hex(hex).context("--hex is not hexadecimal"))
        .collect::<Result<_>>()?;
    let mut report = Exchanged::default();
    let result =
        if args.tcp { stream(args, &messages, &mut report) } else { datagrams(args, &messages, &mut report) };
    if let Err(error) = result {
        report.error = error.to_string();
    }
    Ok(report)
}

fn datagrams(args: &Exchange, messages: &[Vec<u8>], report: &mut Exchanged) -> std::io::Result<()> {
    let to: Vec<SocketAddr> = args.to.iter().map(|to| target(*to, args.mapped)).collect();
    let any =
        if to[0].is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    let any: SocketAddr = any;
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(Duration::from_millis(args.timeout)))?;
    if args.connected {
        socket.connect(to[0])?;
        report.peer = socket.peer_addr()?.to_string();
    }
    for message in messages {
        if args.connected {
            socket.send(message)?;
            continue;
        }
        for to in &to {
            socket.send_to(message, to)?;
        }
    }
    let expected = messages.len() * if args.connected { 1 } else { to.len() };
    let mut buffer = vec![0; 65_535];
    while report.answers.len() < args.answers.unwrap_or(expected) {
        match socket.recv_from(&mut buffer) {
            Ok((length, from)) => report.answers.push((to_hex(&buffer[..length]), from.to_string())),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn stream(args: &Exchange, messages: &[Vec<u8>], report: &mut Exchanged) -> std::io::Result<()> {
    let timeout = Duration::from_millis(args.timeout);
    let mut stream = TcpStream::connect_timeout(&target(args.to[0], args.mapped), timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    report.peer = stream.peer_addr()?.to_string();
    for message in messages {
        let length = u16::try_from(message.len()).unwrap_or(u16::MAX);
        stream.write_all(&[&length.to_be_bytes()[..], message].concat())?;
    }
    while report.answers.len() < args.answers.unwrap_or(messages.len()) {
        let mut length = [0; 2];
        stream.read_exact(&mut length)?;
        let mut message = vec![0; u16::from_be_bytes(length).into()];
        stream.read_exact(&mut message)?;
        report.answers.push((to_hex(&message), report.peer.clone()));
    }
    Ok(())
}
