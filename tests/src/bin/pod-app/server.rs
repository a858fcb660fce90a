//! The servers: a thread per port and family, a thread per connection.

use crate::{bulk, options::Serve};
use anyhow::{Context, Result};
use mesh_tests::app::Who;
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

const BACKLOG: i32 = 4096;
const STACK: usize = 128 * 1024;

type Handler = fn(&str, &TcpStream, SocketAddr) -> io::Result<()>;

/// Serves until the process is ended; prints `ready` once every port is open.
pub(crate) fn serve(args: &Serve) -> Result<()> {
    let tcp: [(&[u16], Handler); 6] = [
        (&args.who, who),
        (&args.echo, echo),
        (&args.bulk, |_, stream, _| bulk::serve(stream)),
        (&args.sleep, sleep),
        (&args.banner, banner),
        (&args.reset, reset),
    ];
    let mut threads = Vec::new();
    for (ports, handler) in tcp {
        for port in ports {
            for addr in both_families(*port) {
                let listener = listen(addr).with_context(|| format!("listen on {addr}"))?;
                let name = args.name.clone();
                threads.push(thread::spawn(move || accept(&listener, &name, handler)));
            }
        }
    }
    for port in &args.udp {
        for addr in both_families(*port) {
            let socket = udp_socket(addr).with_context(|| format!("bind UDP {addr}"))?;
            let name = args.name.clone();
            threads.push(thread::spawn(move || datagrams(&socket, &name)));
        }
    }
    println!("ready");
    for thread in threads {
        let _ = thread.join();
    }
    Ok(())
}

fn both_families(port: u16) -> [SocketAddr; 2] {
    [(Ipv4Addr::UNSPECIFIED, port).into(), (Ipv6Addr::UNSPECIFIED, port).into()]
}

fn listen(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn udp_socket(addr: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

fn accept(listener: &TcpListener, name: &str, handler: Handler) {
    loop {
        match listener.accept() {
            Ok((stream, from)) => {
                let name = name.to_owned();
                let run = move || {
                    // The client sees how its connection ended; a server that logs every reset helps nobody.
                    let _ = handler(&name, &stream, from);
                };
                if let Err(error) = thread::Builder::new().stack_size(STACK).spawn(run) {
                    eprintln!("no thread for a connection: {error}");
                }
            }
            Err(error) => {
                eprintln!("accept: {error}");
                thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

fn who(name: &str, mut stream: &TcpStream, from: SocketAddr) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut lines = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    while lines.by_ref().take(4096).read_line(&mut line)? > 0 {
        let answer = Who {
            payload: line.trim_end().to_owned(),
            name: name.to_owned(),
            accepted_from: from.to_string(),
            peer: stream.peer_addr()?.to_string(),
            local: stream.local_addr()?.to_string(),
        };
        stream.write_all(answer.line().as_bytes())?;
        line.clear();
    }
    Ok(())
}

fn echo(_: &str, mut stream: &TcpStream, _: SocketAddr) -> io::Result<()> {
    let mut buffer = [0; 16 * 1024];
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            n => stream.write_all(&buffer[..n])?,
        }
    }
    // The half that is still open says goodbye: a client that has shut down its side must be able to read this.
    stream.write_all(b"bye\n")?;
    stream.shutdown(Shutdown::Write)
}

fn sleep(_: &str, _: &TcpStream, _: SocketAddr) -> io::Result<()> {
    // The caller holds the connection open meanwhile.
    thread::sleep(Duration::from_secs(3600));
    Ok(())
}

fn banner(name: &str, mut stream: &TcpStream, from: SocketAddr) -> io::Result<()> {
    stream.write_all(format!("220 {name} speaks first\n").as_bytes())?;
    who(name, stream, from)
}

fn reset(_: &str, stream: &TcpStream, _: SocketAddr) -> io::Result<()> {
    let mut line = String::new();
    BufReader::new(stream).take(4096).read_line(&mut line)?;
    // A zero linger time turns the close into a RST.
    socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO))
}

fn datagrams(socket: &UdpSocket, name: &str) {
    let mut buffer = [0; 2048];
    loop {
        let Ok((n, from)) = socket.recv_from(&mut buffer) else { continue };
        let answer = Who {
            payload: String::from_utf8_lossy(&buffer[..n]).trim_end().to_owned(),
            name: name.to_owned(),
            accepted_from: from.to_string(),
            peer: "-".to_owned(),
            local: "-".to_owned(),
        };
        let _ = socket.send_to(answer.line().as_bytes(), from);
    }
}
