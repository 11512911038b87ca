//! What the S3 client's errors mean, and what people should do about them.

use std::error::Error as StdError;
use std::time::Duration;

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use super::S3Store;
use crate::error::{Error, ErrorKind};
use crate::store::{Op, Store as _};

/// What was being done, for the message.
pub(super) struct Failure<'a> {
    pub(super) op: Op,
    pub(super) key: &'a str,
    pub(super) store: &'a S3Store,
}

/// The HTTP status of the answer, if there was one.
pub(super) fn status<E>(e: &SdkError<E, HttpResponse>) -> Option<u16> {
    e.raw_response().map(|r| r.status().as_u16())
}

/// The server's error code, if it gave one.
pub(super) fn code<E: ProvideErrorMetadata>(e: &SdkError<E, HttpResponse>) -> Option<&str> {
    e.as_service_error().and_then(ProvideErrorMetadata::code)
}

/// What an answer means, by its code, else its status; with what to do about it.
fn classify(code: Option<&str>, status: Option<u16>) -> (ErrorKind, &'static str) {
    match code {
        Some("NoSuchBucket") => return (ErrorKind::NotFound, "; create the bucket or correct --store"),
        Some("PreconditionFailed" | "ConditionalRequestConflict" | "OperationAborted") => {
            return (ErrorKind::Conflict, "");
        }
        Some("InvalidAccessKeyId") => {
            return (
                ErrorKind::Denied,
                "; the server does not know this access key: check AWS_ACCESS_KEY_ID or --profile",
            );
        }
        Some("SignatureDoesNotMatch") => {
            return (
                ErrorKind::Denied,
                "; the secret key or the region is wrong: check AWS_SECRET_ACCESS_KEY and --region",
            );
        }
        Some("RequestTimeTooSkewed") => return (ErrorKind::Denied, "; the clocks differ too much: set this host's"),
        Some("ExpiredToken" | "TokenRefreshRequired") => {
            return (ErrorKind::Denied, "; the credentials have expired: get new ones");
        }
        Some("AuthorizationHeaderMalformed" | "PermanentRedirect" | "IllegalLocationConstraintException") => {
            return (ErrorKind::Denied, "; the region is wrong: check --region");
        }
        Some("RequestTimeout") => return (ErrorKind::TimedOut, ""),
        Some("SlowDown" | "ThrottlingException" | "Throttling" | "TooManyRequests") => {
            return (ErrorKind::Throttled, "");
        }
        Some("QuotaExceeded" | "InsufficientStorage" | "XMinioStorageFull") => {
            return (ErrorKind::Full, "; the server has no room left");
        }
        Some("NotImplemented") => return (ErrorKind::Unsupported, ""),
        _ => {}
    }
    match status {
        Some(404) => (ErrorKind::NotFound, ""),
        Some(401 | 403) => {
            (ErrorKind::Denied, "; check the credentials (AWS_ACCESS_KEY_ID, --profile) and their rights")
        }
        Some(408) => (ErrorKind::TimedOut, ""),
        Some(409 | 412) => (ErrorKind::Conflict, ""),
        Some(413) => (ErrorKind::Unsupported, "; the server takes no objects of this size"),
        Some(429 | 503) => (ErrorKind::Throttled, ""),
        Some(501 | 405) => (ErrorKind::Unsupported, ""),
        Some(507) => (ErrorKind::Full, "; the server has no room left"),
        Some(s) if s >= 500 => (ErrorKind::Unreachable, ""),
        Some(s) if (300..400).contains(&s) => {
            (ErrorKind::Denied, "; the server redirects: check --endpoint and --region")
        }
        // A success that cannot be read: the answer broke off.
        Some(s) if s < 300 => (ErrorKind::Unreachable, "; the answer cannot be read"),
        _ => (ErrorKind::Unsupported, ""),
    }
}

/// The first `E` in the chain of causes, also below the wrapping that `io::Error` does not show as its source.
fn cause<'a, E: StdError + 'static>(e: &'a (dyn StdError + 'static)) -> Option<&'a E> {
    let mut at = Some(e);
    while let Some(e) = at {
        if let Some(found) = e.downcast_ref::<E>() {
            return Some(found);
        }
        if let Some(inner) = e.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
            at = Some(inner);
            continue;
        }
        at = e.source();
    }
    None
}

impl Failure<'_> {
    fn doing(&self) -> String {
        let what = if self.op == Op::List && self.key.is_empty() { "all objects" } else { self.key };
        format!("{} {what} in {} at {}", self.op.verb(), self.store.url(), self.store.endpoint)
    }

    pub(super) fn timed_out(&self, limit: Duration) -> Error {
        Error::new(ErrorKind::TimedOut, format!("{}: no whole answer within {limit:?}", self.doing()))
    }

    /// Translates the client's error.
    pub(super) fn translate<E>(&self, e: SdkError<E, HttpResponse>) -> Error
    where
        E: ProvideErrorMetadata + StdError + Send + Sync + 'static,
    {
        let doing = self.doing();
        if let Some(credentials) = cause::<CredentialsError>(&e) {
            let kind = match credentials {
                CredentialsError::ProviderTimedOut(_) => ErrorKind::TimedOut,
                _ => ErrorKind::Denied,
            };
            return Error::new(kind, format!("{doing}: the credentials cannot be had")).with_source(e);
        }
        match &e {
            SdkError::TimeoutError(_) => Error::new(ErrorKind::TimedOut, doing).with_source(e),
            SdkError::DispatchFailure(failure) => {
                if let Some(tls) = cause::<rustls::Error>(&e).filter(|tls| !is_passing(tls)) {
                    let hint = match tls {
                        rustls::Error::InvalidCertificate(_) => {
                            "name its authority with --ca-cert, or give --insecure to accept any"
                        }
                        _ => "check the endpoint and its TLS settings",
                    };
                    let text = format!("{doing}: TLS refuses the server ({tls}); {hint}");
                    return Error::new(ErrorKind::Denied, text);
                }
                let (kind, why) = if failure.is_timeout() {
                    (ErrorKind::TimedOut, "no answer in time")
                } else {
                    (ErrorKind::Unreachable, "no connection, or it broke; check --endpoint")
                };
                Error::new(kind, format!("{doing}: {why}")).with_source(e)
            }
            SdkError::ConstructionFailure(_) => {
                Error::new(ErrorKind::Usage, format!("{doing}: the request cannot be made")).with_source(e)
            }
            _ => {
                let status = status(&e);
                let (kind, hint) = classify(code(&e), status);
                let told = match (code(&e), e.as_service_error().and_then(ProvideErrorMetadata::message)) {
                    (Some(code), Some(text)) => format!("{code}: {text}"),
                    (Some(code), None) => code.to_owned(),
                    (None, _) => "no reason given".to_owned(),
                };
                let status = status.map_or_else(String::new, |s| format!("HTTP {s}, "));
                let bucket = if code(&e) == Some("NoSuchBucket") {
                    format!(": there is no bucket {}", self.store.bucket)
                } else {
                    String::new()
                };
                // The server's text may be long or hostile: one line, bounded.
                let told: String = told.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect();
                Error::new(kind, format!("{doing} failed{bucket} ({status}{told}){hint}"))
            }
        }
    }
}

/// Whether another connection may fare better: the peer's troubles, not its identity or settings.
const fn is_passing(e: &rustls::Error) -> bool {
    matches!(
        e,
        rustls::Error::AlertReceived(rustls::AlertDescription::InternalError)
            | rustls::Error::DecryptError
            | rustls::Error::FailedToGetCurrentTime
            | rustls::Error::FailedToGetRandomBytes
    )
}

/// The error for a body that ends before its announced length: the connection broke.
pub(super) fn broken_body(f: &Failure<'_>, e: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
    Error::new(ErrorKind::Unreachable, format!("{}: the connection broke inside the body", f.doing())).with_source(e)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_have_their_kinds() {
        for (code, status, kind) in [
            (Some("NoSuchKey"), 404, ErrorKind::NotFound),
            (Some("NoSuchBucket"), 404, ErrorKind::NotFound),
            (Some("PreconditionFailed"), 412, ErrorKind::Conflict),
            (Some("ConditionalRequestConflict"), 409, ErrorKind::Conflict),
            (Some("SignatureDoesNotMatch"), 403, ErrorKind::Denied),
            (Some("InvalidAccessKeyId"), 403, ErrorKind::Denied),
            (Some("AccessDenied"), 403, ErrorKind::Denied),
            (None, 401, ErrorKind::Denied),
            (Some("SlowDown"), 503, ErrorKind::Throttled),
            (None, 429, ErrorKind::Throttled),
            (None, 507, ErrorKind::Full),
            (Some("InternalError"), 500, ErrorKind::Unreachable),
            (None, 502, ErrorKind::Unreachable),
            (Some("RequestTimeout"), 400, ErrorKind::TimedOut),
            (Some("InvalidArgument"), 400, ErrorKind::Unsupported),
        ] {
            assert_eq!(classify(code, Some(status)).0, kind, "{code:?} {status}");
        }
    }
}
