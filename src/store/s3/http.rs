//! HTTP and TLS below the S3 client.
//!
//! Invariant: a connection is used only on the tokio runtime that opened it. Its task runs there; a request
//! from another runtime would wait whenever that one is busy, and fail once it has ended. So each runtime
//! gets a pool of its own, made at its first request.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use aws_smithy_http_client::{Connector, ConnectorBuilder};
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpClient, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::body::SdkBody;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector as TcpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::runtime::{Handle, Id};

use crate::error::{Error, ErrorKind, Result};

/// Whom to trust.
#[derive(Debug, Clone)]
pub(super) enum Trust {
    /// The system's authorities.
    System,
    /// These authorities and no others, in PEM.
    Authorities(Vec<u8>),
    /// Anybody.
    Anybody,
}

impl Trust {
    /// Reads a PEM file of authorities.
    pub(super) fn from_file(path: &Path) -> Result<Self> {
        let pem = std::fs::read(path).map_err(|e| Error::io(format!("reading the CA file {}", path.display()), e))?;
        let wrong = |why: &str| {
            Error::new(ErrorKind::Usage, format!("the CA file {} {why}; give certificates in PEM", path.display()))
        };
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(&pem) {
            let certificate = certificate.map_err(|e| wrong("is not in PEM").with_source(e))?;
            roots.add(certificate).map_err(|e| wrong("has a certificate that cannot be used").with_source(e))?;
        }
        if roots.is_empty() {
            return Err(wrong("has no certificate"));
        }
        Ok(Self::Authorities(pem))
    }

    fn connector(&self, settings: &HttpConnectorSettings) -> SharedHttpConnector {
        let verified = |context: Option<TlsContext>| {
            let builder: ConnectorBuilder<_> = Connector::builder()
                .connector_settings(settings.clone())
                .proxy_config(ProxyConfig::from_env())
                .tls_provider(Provider::Rustls(CryptoMode::AwsLc));
            SharedHttpConnector::new(match context {
                Some(context) => builder.tls_context(context).build(),
                None => builder.build(),
            })
        };
        match self {
            Self::System => verified(None),
            Self::Authorities(pem) => {
                let store = TrustStore::empty().with_pem_certificate(pem.clone());
                // Building a context checks nothing and cannot fail; the certificates were checked in `from_file`.
                verified(TlsContext::builder().with_trust_store(store).build().ok())
            }
            Self::Anybody => SharedHttpConnector::new(Trusting::new(settings)),
        }
    }
}

/// Makes the client's HTTP side.
pub(super) fn client(trust: Trust) -> SharedHttpClient {
    SharedHttpClient::new(PerRuntime { trust, made: Mutex::default() })
}

struct PerRuntime {
    trust: Trust,
    made: Mutex<HashMap<Option<Id>, SharedHttpConnector>>,
}

impl fmt::Debug for PerRuntime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PerRuntime").finish_non_exhaustive()
    }
}

/// More runtimes than any program of ours has; ids of ended ones would gather otherwise.
const MAX_RUNTIMES: usize = 64;

impl HttpClient for PerRuntime {
    fn http_connector(&self, settings: &HttpConnectorSettings, _: &RuntimeComponents) -> SharedHttpConnector {
        let id = Handle::try_current().ok().map(|h| h.id());
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.len() >= MAX_RUNTIMES && !made.contains_key(&id) {
            // Requests under way keep their pools; the next ones open new connections.
            made.clear();
        }
        // The settings are the same for all requests of a client of ours: it is made with them once.
        made.entry(id).or_insert_with(|| self.trust.connector(settings)).clone()
    }
}

/// A connector that accepts any certificate, for `--insecure`; the SDK's own offers no such way.
#[derive(Debug)]
struct Trusting {
    client: Client<HttpsConnector<TcpConnector>, SdkBody>,
}

impl Trusting {
    fn new(settings: &HttpConnectorSettings) -> Self {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .expect("the default provider knows the default versions")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
            .with_no_client_auth();
        let mut tcp = TcpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(settings.connect_timeout());
        let https = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new()).pool_timer(TokioTimer::new()).build(https);
        Self { client }
    }
}

impl HttpConnector for Trusting {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let request = match request.try_into_http1x() {
            Ok(request) => request,
            Err(e) => return HttpConnectorFuture::ready(Err(ConnectorError::user(e.into()))),
        };
        let answer = self.client.request(request);
        HttpConnectorFuture::new(async move {
            match answer.await {
                Ok(response) => HttpResponse::try_from(response.map(SdkBody::from_body_1_x))
                    .map_err(|e| ConnectorError::other(e.into(), None)),
                Err(e) => Err(ConnectorError::io(e.into())),
            }
        })
    }
}

/// Accepts every certificate, but still checks that the server holds its key.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_ca_file_is_refused_when_it_is_named() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("ca.pem");
        assert_eq!(Trust::from_file(&path).expect_err("missing").kind(), ErrorKind::NotFound);
        for text in ["", "hello", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
            std::fs::write(&path, text).expect("write");
            assert_eq!(Trust::from_file(&path).expect_err(text).kind(), ErrorKind::Usage);
        }
    }
}
