"""What a router names a parcel by: whoever knows the secret may have the parcel sent, or give it up."""

SECRET_BYTES = 16
