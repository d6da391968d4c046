//! Where a server is: its URL, taken apart and looked up.

use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::Duration;

use hyper::Uri;

/// A base URL, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    host: String,
    port: u16,
    /// What goes into the `Host` header.
    pub(super) authority: String,
    /// Path of completions.
    pub(super) path: String,
}

impl Address {
    /// Takes a base URL apart.
    pub(super) fn parse(url: &str) -> Result<Self, String> {
        let wrong = |what: &str| Err(format!("`url` is {url:?}: {what}"));
        let Ok(uri) = url.parse::<Uri>() else {
            return wrong("no URL, write it as http://localhost:8000/v1");
        };
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => {
                return wrong(
                    "TLS is not spoken here; measure beside the server over http, or have a proxy or a tunnel end TLS",
                );
            }
            _ => return wrong("it must begin with http://"),
        }
        let Some(authority) = uri.authority().filter(|a| !a.host().is_empty()) else {
            return wrong("it names no host");
        };
        if authority.as_str().contains('@') {
            return wrong(
                "a user in it would be recorded; give a key by the name of its environment variable",
            );
        }
        if uri.query().is_some() {
            return wrong("it has a query, and a base URL has none");
        }
        let path = uri.path().trim_end_matches('/');
        if path.is_empty() {
            return wrong("it has no path; the base URL of most servers ends with /v1");
        }
        // What follows the host and a colon; the parser takes anything there.
        let after =
            authority.as_str().rsplit_once(':').map(|(_, port)| port).filter(|port| !port.ends_with(']'));
        let port = match (authority.port_u16(), after) {
            (Some(port), _) if port > 0 => port,
            (None, None | Some("")) => 80,
            _ => return wrong("its port is no number of 1 to 65535"),
        };
        // Brackets belong to the URL, not to the address that they hold.
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        Ok(Self { host, port, authority: authority.as_str().to_owned(), path: format!("{path}/completions") })
    }

    /// Looks its name up, once for a whole run, and finds out whether anybody answers there.
    pub(super) fn reach(&self, patience: Duration) -> Result<SocketAddr, String> {
        let Self { host, port, .. } = self;
        let found = (host.as_str(), *port).to_socket_addrs();
        let found = found.map_err(|error| format!("{host} cannot be looked up: {error}"))?;
        let mut last = None;
        for address in found {
            match TcpStream::connect_timeout(&address, patience) {
                Ok(_) => return Ok(address),
                Err(error) => last = Some(format!("{address}: {error}")),
            }
        }
        let why = last.unwrap_or_else(|| format!("{host} has no address"));
        Err(format!("nothing answers at {host} port {port} ({why}): start the server, or correct `url`"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_url_is_taken_apart() {
        let address = Address::parse("http://[::1]:8000/v1/").unwrap();
        assert_eq!((address.host.as_str(), address.port), ("::1", 8000));
        assert_eq!((address.authority.as_str(), address.path.as_str()), ("[::1]:8000", "/v1/completions"));
        for url in ["http://gpu/v1", "http://gpu:/v1", "http://[::1]/v1"] {
            assert_eq!(Address::parse(url).unwrap().port, 80, "{url}");
        }
    }

    #[test]
    fn what_cannot_be_used_says_what_to_write() {
        let wrong = [
            ("https://api/v1", "TLS"),
            ("localhost:8000/v1", "http://"),
            ("http://localhost:8000", "no path"),
            ("http://me:secret@gpu/v1", "environment variable"),
            ("http://gpu/v1?key=1", "query"),
            ("http://gpu:80000/v1", "port"),
            ("http://gpu:8OOO/v1", "port"),
            ("http://[::1]:x/v1", "port"),
            ("http://gpu:0/v1", "port"),
            ("http://", "URL"),
            ("", "URL"),
            ("not a url", "URL"),
        ];
        for (url, part) in wrong {
            let error = Address::parse(url).unwrap_err();
            assert!(error.contains(part) && error.contains("`url`"), "{url}: {error}");
        }
    }
}
